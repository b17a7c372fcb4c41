"""8-bit tensors: blocks of 256 elements, each with a float32 scale and 256 codes of a dynamic map.

    value = map[code] * scale of its block        scale = largest magnitude in the block

Source: block-wise dynamic quantisation of Dettmers, Lewis, Shleifer, Zettlemoyer 2022, "8-bit Optimizers via Block-wise
Quantization", arXiv:2110.02861, sections 2.1 and 2.2: seven decades, with more cells for larger values.

Decade d has 2^d cells. Its codes are the numbers n from 2^d to 2^(d+1) - 1, and within it the value is linear in n.
Encoding and decoding use this arithmetic instead of a lookup table, so a compiler fuses them into the update.
"""

import dataclasses

import torch
from torch import Tensor

BLOCK = 256
# States with fewer elements stay in float32: norms and biases, where 8 bits would save nothing.
MIN_ELEMENTS = 4096
_NUM_DECADES = 7
_ZERO_OF_SIGNED = 127
_TINY = torch.finfo(torch.float32).tiny


@dataclasses.dataclass(frozen=True)
class _Decade:
    """The values from ``unit / 10`` to ``unit``: midpoints of equal cells, numbered from ``num_cells`` on.

    Attributes:
        num_cells: number of cells, a power of two.
        unit: upper end of the decade.
        above: magnitude above which the first value of this decade is nearer than the last value of the one below.
    """

    num_cells: int
    unit: float
    above: float

    @property
    def slope(self) -> float:
        """Difference between the values of neighbouring cells."""
        return 0.9 * self.unit / self.num_cells

    @property
    def offset(self) -> float:
        """Offset of the line ``slope * n + offset`` through the values."""
        return self.unit * (0.1 + 0.9 * (0.5 / self.num_cells - 1))

    @property
    def last(self) -> float:
        """Largest value of the decade."""
        return self.slope * (2 * self.num_cells - 1) + self.offset


def _decades(*, signed: bool) -> tuple[_Decade, ...]:
    """Returns the seven decades from 1e-7 to 1; an unsigned map has twice the cells."""
    found: list[_Decade] = []
    for power in range(_NUM_DECADES):
        num_cells, unit = 2 ** (power + (not signed)), 10.0 ** (power - _NUM_DECADES + 1)
        decade = _Decade(num_cells, unit, 0.0)
        before = found[-1].last if found else 0.0
        above = (before + decade.slope * num_cells + decade.offset) / 2
        found.append(dataclasses.replace(decade, above=above))
    return tuple(found)


_SIGNED, _UNSIGNED = _decades(signed=True), _decades(signed=False)


def code_of_zero(*, signed: bool) -> int:
    """Returns the code of 0. The code of 1 is always 255."""
    return _ZERO_OF_SIGNED if signed else 0


def num_blocks(num_elements: int) -> int:
    """Returns the number of blocks of a tensor with this many elements; the last may be partly unused."""
    return -(-num_elements // BLOCK)


def stored_bytes(num_elements: int) -> int:
    """Returns the bytes of a tensor with this many elements: codes and scales."""
    return num_blocks(num_elements) * (BLOCK + 4)


def decode(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """Returns the elements of whole blocks.

    Args:
        codes: (blocks, 256) uint8.
        scales: (blocks,) float32.
        signed: whether to use the map with negative values.

    Returns:
        (blocks, 256) float32.
    """
    above_zero = codes.to(torch.float32) - _ZERO_OF_SIGNED
    number = above_zero.abs() if signed else codes.to(torch.float32) + 1
    values = torch.zeros_like(number)
    decades = _SIGNED if signed else _UNSIGNED
    for decade in decades:
        values = torch.where(number >= decade.num_cells, number * decade.slope + decade.offset, values)
    values = torch.where(number >= 2 * decades[-1].num_cells, 1.0, values)
    if signed:
        values = torch.where(above_zero < 0, -values, values)
    return values * scales[:, None]


def encode(elements: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Returns the nearest codes of whole blocks, and the scales of the blocks.

    Args:
        elements: (blocks, 256) float32; non-negative unless ``signed``.
        signed: whether to use the map with negative values.

    Returns:
        (blocks, 256) uint8 and (blocks,) float32.
    """
    magnitudes = elements.abs()
    scales = magnitudes.amax(1)
    magnitudes = magnitudes / scales.clamp(min=_TINY)[:, None]
    decades = _SIGNED if signed else _UNSIGNED
    number = torch.full_like(magnitudes, 0.0 if signed else 1.0)
    for decade in decades:
        num_cells = float(decade.num_cells)
        cell = magnitudes * (num_cells / (0.9 * decade.unit)) + num_cells * (1 - 0.1 / 0.9)
        # Between the end of a decade and the next one's lower border the nearest value is the last of the decade.
        number = torch.where(magnitudes > decade.above, cell.clamp(num_cells, 2 * num_cells - 1), number)
    number = torch.where(magnitudes > (decades[-1].last + 1) / 2, 2.0 * decades[-1].num_cells, number)
    steps = number.to(torch.int32)
    if not signed:
        return (steps - 1).to(torch.uint8), scales
    # There is one negative value less than positive ones: -1 gets the code of the most negative value.
    steps = torch.where(elements < 0, -steps.clamp(max=_ZERO_OF_SIGNED), steps)
    return (steps + _ZERO_OF_SIGNED).to(torch.uint8), scales
