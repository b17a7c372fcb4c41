"""Tensors as small integers: groups of 256 elements, each with a scale and a zero point.

    value = (code - zero) * scale         codes 0 to 2^bits - 1, in 8 or 4 bits; 4-bit codes lie two in a byte

Source: the asymmetric group quantiser of Q-GaLore, Zhang et al. 2024, arXiv:2407.08296, equation 1. Where the released
code goes wrong, this does not: the range of a group always holds zero (a group of values that are all positive would
lose its offset), codes of 4 bits are packed, and all arithmetic is float32.

A group's grid (scale and zero point) of 8 bits has one step to spare, so that rounding either way stays inside it. It
is kept from update to update while the group still fits into it and fills enough of it: on a grid that stays, only
elements that move are rounded, and each of them by the chance of its own movement.
"""

import torch
from torch import Tensor

from galore_fx.runtime.formats.rounding import round_to_bfloat16
from galore_fx.runtime.uniform_loop import alike

GROUP = 256
# A zero point per byte, and a scale in bfloat16: 3 bytes for each group.
SCALE_DTYPE = torch.bfloat16
GRID_BYTES = SCALE_DTYPE.itemsize + 1
_NUM_STEPS = {4: 15, 8: 254}
# bfloat16 rounds by up to 2^-8, and a scale must not come out smaller than the range asks for.
_ROUNDING_UP = 1.004
_SMALLEST_SCALE = 2.0**-120
# So much wider than its group is a new grid, since weights move, and so many times as wide is one that is given up.
_HEADROOM = {4: 0.0, 8: 1 / 16}
_WIDEST = 1.5
# As many are quantised at once, so that the float32 copy is small.
_SLICE_GROUPS = 2**20 // GROUP


def num_groups(num_elements: int) -> int:
    """Groups of a tensor of that many elements; the last may be partly unused."""
    return -(-num_elements // GROUP)


def stored_bytes(num_elements: int, bits: int) -> int:
    """Bytes of a tensor of that many elements: codes, scales and zero points."""
    return num_groups(num_elements) * (GROUP * bits // 8 + GRID_BYTES)


def fit_grids(lowest: Tensor, highest: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The grids of groups whose elements lie in these ranges.

    Args:
        lowest, highest: (groups,) float32.
        bits: of a code.

    Returns:
        Scales (groups,) in ``SCALE_DTYPE`` and zero points (groups,) uint8.
    """
    num_steps, headroom, largest = _NUM_STEPS[bits], _HEADROOM[bits], 2.0**bits - 1
    lowest, highest = lowest.clamp(max=0.0), highest.clamp(min=0.0)
    widening = (1 + headroom) * _ROUNDING_UP / num_steps
    scales = round_to_bfloat16((highest * widening - lowest * widening).clamp(min=_SMALLEST_SCALE))
    place = (highest * (headroom / 2) - lowest * (1 + headroom / 2)) / scales
    zeros = (place.ceil() if num_steps < largest else place.round()).clamp(0.0, largest)
    return scales.to(SCALE_DTYPE), zeros.to(torch.uint8)


def quantize(elements: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest codes of a tensor, and its grids.

    Args:
        elements: any shape and floating dtype; finite.
        bits: 4 or 8.

    Returns:
        Codes (groups, 256 * bits / 8) uint8, scales (groups,) bfloat16, zero points (groups,) uint8.
    """
    flat = elements.reshape(-1)
    groups, device = num_groups(flat.numel()), flat.device
    codes = torch.empty((groups, GROUP * bits // 8), dtype=torch.uint8, device=device)
    scales = torch.empty((groups,), dtype=SCALE_DTYPE, device=device)
    zeros = torch.empty((groups,), dtype=torch.uint8, device=device)
    for first in alike(range(0, groups, _SLICE_GROUPS)):
        part = slice(first, first + _SLICE_GROUPS)
        made = _quantize_slice(flat[first * GROUP : (first + _SLICE_GROUPS) * GROUP], bits)
        for whole, value in zip((codes, scales, zeros), made, strict=True):
            whole[part] = value
    return codes, scales, zeros


def _quantize_slice(flat: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    groups = torch.nn.functional.pad(flat.to(torch.float32), (0, -flat.numel() % GROUP)).view(-1, GROUP)
    scales, zeros = fit_grids(groups.amin(1), groups.amax(1), bits)
    places = groups / scales.to(torch.float32)[:, None] + zeros.to(torch.float32)[:, None]
    codes = places.round().clamp(0.0, 2.0**bits - 1).to(torch.uint8)
    return pack(codes) if bits == 4 else codes, scales, zeros


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, shape: list[int], dtype: torch.dtype) -> Tensor:
    """The tensor that ``quantize`` was given, as far as its codes tell.

    Args:
        codes, scales, zeros: as it returned them.
        bits: 4 or 8.
        shape, dtype: of the tensor.
    """
    flat = _values(unpack(codes) if bits == 4 else codes, scales, zeros).to(dtype).view(-1)
    num_elements = 1
    for size in shape:
        num_elements *= size
    return (flat if flat.numel() == num_elements else flat[:num_elements]).view(shape)


def _values(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    steps = codes.to(torch.float32) - zeros.to(torch.float32)[:, None]
    return steps * scales.to(torch.float32)[:, None]


def pack(codes: Tensor) -> Tensor:
    """Codes (groups, 256) of 4 bits, two in a byte: (groups, 128), the even one in the low half."""
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """The codes (groups, 256) that ``pack`` was given."""
    return torch.stack((packed & 15, packed >> 4), 2).view(packed.shape[0], -1)


def add_and_round(
    codes: Tensor, scales: Tensor, zeros: Tensor, change: Tensor, factor: Tensor, thresholds: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``factor * values + change`` in 8 bits again, each element rounded up where its remainder exceeds a threshold.

    With thresholds that are uniform in [0, 1) the expectation of the result is the sum itself; with 0.5 it is the
    nearest.

    Args:
        codes: (groups, 256) uint8.
        scales, zeros: (groups,).
        change: (groups, 256), any floating dtype.
        factor: 0-d float32.
        thresholds: (groups, 256) float32, or 0-d.

    Returns:
        New codes, scales and zero points.
    """
    moved = _values(codes, scales, zeros) * factor + change.to(torch.float32)
    lowest, highest = moved.amin(1).clamp(max=0.0), moved.amax(1).clamp(min=0.0)
    old_scales, old_zeros = scales.to(torch.float32), zeros.to(torch.float32)
    fits = (lowest >= -old_zeros * old_scales) & (highest <= (255.0 - old_zeros) * old_scales)
    fits = fits & ((highest - lowest) * _WIDEST >= _NUM_STEPS[8] * old_scales)
    new_scales, new_zeros = fit_grids(lowest, highest, 8)
    scales = torch.where(fits, scales, new_scales)
    zeros = torch.where(fits, zeros, new_zeros)
    places = moved / scales.to(torch.float32)[:, None] + zeros.to(torch.float32)[:, None]
    whole = places.floor()
    rounded = whole + (places - whole > thresholds).to(torch.float32)
    return rounded.clamp(0.0, 255.0).to(torch.uint8), scales, zeros
