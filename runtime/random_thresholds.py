"""Uniform numbers from a counter: the same for the same seed, update and element, whatever device or order they are in.

Nothing is kept between calls, so a resumed run draws what the uninterrupted one would have, and so do the ranks of a
parallel one. An element's number is a hash of its index and of a key that the host makes for each tensor and update.

Source: the keys by SplitMix64, Steele, Lea, Flood 2014, "Fast Splittable Pseudorandom Number Generators", OOPSLA. The
hash is two rounds of xor-shift and multiply, with the constants of one of C. Wellons's hash-prospector's results.
"""

import torch
from torch import Tensor

_MASK_64 = 2**64 - 1
_NUM_BITS = 24  # what a float32 holds exactly


def key_of(seed: int, *numbers: int) -> int:
    """A key from a seed and what tells the draws apart, as a number of 32 bits with a sign."""
    state = 0
    for number in (seed, *numbers):
        state = _mixed((state ^ (number & _MASK_64)) + 0x9E3779B97F4A7C15)
    return (state >> 32) - (state >> 63 << 32)


def generator_of(key: int) -> torch.Generator:
    """torch's own generator, on the CPU, started from a key of ``key_of``."""
    return torch.Generator().manual_seed(key & 0xFFFFFFFF)


def _mixed(state: int) -> int:
    state &= _MASK_64
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK_64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK_64
    return state ^ (state >> 31)


def uniform_numbers(counters: Tensor, key: Tensor) -> Tensor:
    """A number in [0, 1), a multiple of 2^-24, for each counter.

    Args:
        counters: int32, the indices of the elements.
        key: 0-d int32, the bits of a key.

    Returns:
        float32, of the shape of ``counters``.
    """
    # Sums and products wrap around; a shift to the right brings in copies of the sign, which the masks take off.
    bits = counters + key
    bits = bits ^ ((bits >> 15) & 0x1FFFF)
    bits = bits * 0x2C1B3C6D
    bits = bits ^ ((bits >> 12) & 0xFFFFF)
    bits = bits * 0x297A2D39
    bits = bits ^ ((bits >> 15) & 0x1FFFF)
    leading = (bits >> (32 - _NUM_BITS)) & (2**_NUM_BITS - 1)
    numbers: Tensor = leading.to(torch.float32) * 2.0**-_NUM_BITS
    return numbers
