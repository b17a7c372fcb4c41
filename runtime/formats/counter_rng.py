"""Random numbers from a counter: the same for the same seed, update and element, whatever device or order they are in.

Nothing is kept between calls, so a resumed run draws what the uninterrupted one would have, and so do the ranks of a
parallel one. An element's number is a hash of its index and of a key that the host makes for each tensor and update.

Source: the keys by SplitMix64, Steele, Lea, Flood 2014, "Fast Splittable Pseudorandom Number Generators", OOPSLA. The
hash is two rounds of xor-shift and multiply, with the constants of one of C. Wellons's hash-prospector's results.
"""

import torch
from torch import Tensor

_MASK_64 = 2**64 - 1
_NUM_BITS = 24  # what a float32 holds exactly
_ROW = 4  # numbers of a table's row, so that each begins at a multiple of 16 bytes, as kernels want it


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


def random_bits(counters: Tensor, key: Tensor) -> Tensor:
    """32 random bits for each counter.

    Args:
        counters: int32, the indices of the elements.
        key: 0-d int32, the bits of a key. That of a part which begins at element s is the whole's key plus s.

    Returns:
        int32, of the shape of ``counters``.
    """
    # Sums and products wrap around; a shift to the right brings in copies of the sign, which the masks take off.
    bits = counters + key
    bits = bits ^ ((bits >> 15) & 0x1FFFF)
    bits = bits * 0x2C1B3C6D
    bits = bits ^ ((bits >> 12) & 0xFFFFF)
    bits = bits * 0x297A2D39
    return bits ^ ((bits >> 15) & 0x1FFFF)


def uniform_numbers(counters: Tensor, key: Tensor) -> Tensor:
    """A number in [0, 1), a multiple of 2^-24, for each counter; float32. Arguments are those of ``random_bits``."""
    leading = (random_bits(counters, key) >> (32 - _NUM_BITS)) & (2**_NUM_BITS - 1)
    numbers: Tensor = leading.to(torch.float32) * 2.0**-_NUM_BITS
    return numbers


class UpdateKeys:
    """The keys of one optimizer's parameters, on the device, made once per update.

    Args:
        seed: of all of them.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._made_for: object = None
        self._table = torch.empty(0)

    def of(self, num_updates: int, number: int, count: int, device: torch.device) -> Tensor:
        """The key of parameter ``number`` of ``count`` in the update after ``num_updates`` others; 0-d int32."""
        made_for = num_updates, count, device
        if made_for != self._made_for:
            keys = [[key_of(self._seed, num_updates, each)] + [0] * (_ROW - 1) for each in range(count)]
            self._table = torch.tensor(keys, dtype=torch.int32).to(device)
            self._made_for = made_for
        return self._table[number, 0]
