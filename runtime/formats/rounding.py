"""float32 values on the grid of a narrower format, by their bits: to the nearest, or up or down by chance.

Both return float32 whose cast to the format is exact. A cast alone does not do that inside a compiled kernel: Inductor
drops a cast to a narrower format and back, so what is computed from the result would belong to another value than the
one that is stored.

Rounded up with the probability of the part that is cut off, a value is right on average however small that part is.
Rounded to the nearest, an update below half a unit in the last place of the weight is lost entirely.
"""

import torch
from torch import Tensor

from galore_fx.runtime.formats.counter_rng import random_bits

# Bits of a float32's significand that the format has no room for.
_CUT_BITS = {torch.bfloat16: 16, torch.float16: 13}
# float16 has steps of 2^-24 below 2^-14; from here on torch, too, rounds to infinity.
_SMALLEST_NORMAL, _STEPS_OF_ONE, _LARGEST, _INFINITE = 2.0**-14, 2.0**24, 65504.0, 65520.0


def rounds_by_chance(dtype: torch.dtype) -> bool:
    """Whether ``round_stochastically`` knows the format: bfloat16 and float16."""
    return dtype in _CUT_BITS


def round_to_bfloat16(values: Tensor) -> Tensor:
    """The nearest values that bfloat16 can hold, ties to even.

    Args:
        values: float32, any shape; finite.

    Returns:
        float32.
    """
    bits = values.view(torch.int32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).view(torch.float32)


def round_stochastically(values: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Each value rounded to one of its two neighbours in a 16-bit format, to the nearer one with the larger chance.

    The expectation over the random bits is the value itself. NaN and infinities stay.

    Args:
        values: float32, any shape.
        dtype: bfloat16 or float16.
        bits: int32 of the same shape, uniformly random.

    Returns:
        float32.

    Source: Gupta, Agrawal, Gopalakrishnan, Narayanan 2015, "Deep Learning with Limited Numerical Precision",
    arXiv:1502.02551, section 3.1; here by what is added to the bits that will be cut off, which carries or does not.
    """
    cut = 2 ** _CUT_BITS[dtype] - 1
    carried = (values.view(torch.int32) + (bits & cut)) & ~cut
    rounded = carried.view(torch.float32)
    if dtype is torch.bfloat16:
        return torch.where(values.abs() < float("inf"), rounded, values)
    thresholds = (bits & cut).to(torch.float32) * (1.0 / (cut + 1))
    small = (values * _STEPS_OF_ONE + thresholds).floor() * (1.0 / _STEPS_OF_ONE)
    rounded = torch.where(values.abs() < _SMALLEST_NORMAL, small, rounded).clamp(-_LARGEST, _LARGEST)
    return torch.where(values.abs() < _INFINITE, rounded, values)


def rounded_as(values: Tensor, like: Tensor, key: Tensor) -> Tensor:
    """Values as they will be stored in a tensor: rounded stochastically where it has 16 bits, else as they are.

    Args:
        values: float32, or wider.
        like: the tensor, of the same shape.
        key: 0-d int32, as of ``random_bits``; element i draws with the counter i.

    Returns:
        Of the dtype of ``values``.
    """
    if not rounds_by_chance(like.dtype):
        return values
    counters = torch.arange(like.numel(), dtype=torch.int32, device=like.device).view(like.shape)
    return round_stochastically(values, like.dtype, random_bits(counters, key))
