"""Tensors of small integers: groups of 256 elements, each with a scale and a zero point.

    value = (code - zero) * scale         codes 0 to 2^bits - 1, in 8 or 4 bits; 4-bit codes are packed two per byte

Source: the asymmetric group quantiser of Q-GaLore, Zhang et al. 2024, arXiv:2407.08296, equation 1. This code corrects
three errors of the released code. The range of a group always includes zero (an all-positive group would lose its
offset), 4-bit codes are packed, and all arithmetic is float32.

The 8-bit grid of a group (scale and zero point) has one step to spare, so rounding up or down stays inside it. A grid
is kept across updates while its group fits into it and fills enough of it. On a kept grid only the elements that move
are rounded, each with the probability of its own movement.
"""

import torch
from torch import Tensor

from galore_fx.runtime.formats.rounding import round_to_bfloat16
from galore_fx.runtime.uniform_loop import alike

GROUP = 256
# A one-byte zero point and a bfloat16 scale: 3 bytes per group.
SCALE_DTYPE = torch.bfloat16
GRID_BYTES = SCALE_DTYPE.itemsize + 1
_NUM_STEPS = {4: 15, 8: 254}
# bfloat16 rounds by up to 2^-8; this factor keeps a rounded scale large enough for its range.
_ROUNDING_UP = 1.004
_SMALLEST_SCALE = 2.0**-120
# A new grid is wider than its group by this fraction, since weights move; one _WIDEST times as wide is replaced.
_HEADROOM = {4: 0.0, 8: 1 / 16}
_WIDEST = 1.5
# Groups quantised at once; this bounds the float32 copy.
_SLICE_GROUPS = 2**20 // GROUP


def num_groups(num_elements: int) -> int:
    """Returns the number of groups of a tensor with this many elements; the last may be partly unused."""
    return -(-num_elements // GROUP)


def stored_bytes(num_elements: int, bits: int) -> int:
    """Returns the bytes of a tensor with this many elements: codes, scales and zero points."""
    return num_groups(num_elements) * (GROUP * bits // 8 + GRID_BYTES)


def fit_grids(lowest: Tensor, highest: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Returns the grids of groups whose elements lie in these ranges.

    Args:
        lowest, highest: (groups,) float32, ends of the ranges.
        bits: bits of a code, 4 or 8.

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
    """Returns the nearest codes of a tensor, and its grids.

    Args:
        elements: any shape and floating dtype; finite.
        bits: bits of a code, 4 or 8.

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
    """Reconstructs a tensor from its codes and grids.

    Args:
        codes, scales, zeros: as returned by ``quantize``.
        bits: bits of a code, 4 or 8.
        shape, dtype: shape and dtype of the result.
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
    """Packs 4-bit codes (groups, 256) two per byte, (groups, 128); the even one is in the low half."""
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Returns the codes (groups, 256) of packed bytes (groups, 128); inverse of ``pack``."""
    return torch.stack((packed & 15, packed >> 4), 2).view(packed.shape[0], -1)


def add_and_round(
    codes: Tensor, scales: Tensor, zeros: Tensor, change: Tensor, factor: Tensor, thresholds: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes ``factor * values + change`` and quantises it to 8 bits again.

    An element is rounded up where its fractional part exceeds its threshold. With thresholds uniform in [0, 1) the
    expectation of the result is the exact sum; with 0.5 the result is the nearest code.

    Args:
        codes: (groups, 256) uint8.
        scales, zeros: (groups,) bfloat16 and (groups,) uint8.
        change: (groups, 256), any floating dtype.
        factor: 0-d float32.
        thresholds: (groups, 256) float32, or 0-d.

    Returns:
        New codes, scales and zero points, in the shapes and dtypes of the old ones.
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
