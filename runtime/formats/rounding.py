"""Rounds float32 values to a narrower format by bit arithmetic, to nearest or stochastically.

Both functions return float32 values whose cast to the format is exact. A plain cast does not suffice in a compiled
kernel: Inductor drops a cast to a narrower format and back, so later results would use another value than the stored
one.

Stochastic rounding goes up with the probability of the fraction that is cut off, so the expectation is exact. Rounding
to nearest loses every update below half a unit in the last place of the weight.
"""

import torch
from torch import Tensor

from galore_fx.runtime.formats.counter_rng import random_bits

# Bits of a float32 significand that do not fit into the format.
_CUT_BITS = {torch.bfloat16: 16, torch.float16: 13}
# float16 has steps of 2^-24 below 2^-14. From 65520 on it rounds to infinity, as in torch.
_SMALLEST_NORMAL, _STEPS_OF_ONE, _LARGEST, _INFINITE = 2.0**-14, 2.0**24, 65504.0, 65520.0


def rounds_by_chance(dtype: torch.dtype) -> bool:
    """Returns whether ``round_stochastically`` supports the format: bfloat16 and float16."""
    return dtype in _CUT_BITS


def round_to_bfloat16(values: Tensor) -> Tensor:
    """Rounds to the nearest bfloat16 values, ties to even.

    Args:
        values: float32, any shape; finite.

    Returns:
        float32, the shape of ``values``.
    """
    bits = values.view(torch.int32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).view(torch.float32)


def round_stochastically(values: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Rounds each value to one of its two neighbours in a 16-bit format, the nearer one with higher probability.

    The expectation over the random bits is the value itself. NaN and infinities are unchanged.

    Args:
        values: float32, any shape.
        dtype: bfloat16 or float16.
        bits: int32 of the same shape, uniformly random.

    Returns:
        float32, the shape of ``values``.

    Source: Gupta, Agrawal, Gopalakrishnan, Narayanan 2015, "Deep Learning with Limited Numerical Precision",
    arXiv:1502.02551, section 3.1. Here random bits are added to the bits that are cut off, and the carry decides.
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
    """Rounds values stochastically for storage in a 16-bit tensor; returns them unchanged for other dtypes.

    Args:
        values: float32, or wider if ``like`` has no 16-bit dtype.
        like: the tensor that will store them, of the same shape.
        key: 0-d int32 key for ``random_bits``; element i draws with the counter i.

    Returns:
        The rounded values, in the dtype of ``values``.
    """
    if not rounds_by_chance(like.dtype):
        return values
    counters = torch.arange(like.numel(), dtype=torch.int32, device=like.device).view(like.shape)
    return round_stochastically(values, like.dtype, random_bits(counters, key))
