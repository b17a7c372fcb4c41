"""Counter-based random numbers: equal for equal seed, update and element, on any device and in any order.

No state is kept between calls, so a resumed run and all ranks of a parallel run draw the same numbers. The number of an
element is a hash of its index and of a key, which the host computes for each tensor and update.

Source: the keys use SplitMix64, Steele, Lea, Flood 2014, "Fast Splittable Pseudorandom Number Generators", OOPSLA. The
hash is two rounds of xor-shift and multiply, with constants from the results of C. Wellons's hash-prospector.
"""

import torch
from torch import Tensor

_MASK_64 = 2**64 - 1
_NUM_BITS = 24  # a float32 holds as many exactly
_ROW = 4  # int32 numbers per table row: kernels need rows aligned to 16 bytes


def key_of(seed: int, *numbers: int) -> int:
    """Returns a key, a signed 32-bit number, from a seed and the numbers that distinguish the draw."""
    state = 0
    for number in (seed, *numbers):
        state = _mixed((state ^ (number & _MASK_64)) + 0x9E3779B97F4A7C15)
    return (state >> 32) - (state >> 63 << 32)


def generator_of(key: int) -> torch.Generator:
    """Returns a torch CPU generator seeded with a key from ``key_of``."""
    return torch.Generator().manual_seed(key & 0xFFFFFFFF)


def _mixed(state: int) -> int:
    state &= _MASK_64
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK_64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK_64
    return state ^ (state >> 31)


def random_bits(counters: Tensor, key: Tensor) -> Tensor:
    """Returns 32 random bits for each counter.

    Args:
        counters: int32, the indices of the elements.
        key: 0-d int32, the key. For a part that begins at element s, pass the key of the whole tensor plus s.

    Returns:
        int32, the shape of ``counters``.
    """
    # Sums and products wrap around. A right shift brings in copies of the sign bit, which the masks clear.
    bits = counters + key
    bits = bits ^ ((bits >> 15) & 0x1FFFF)
    bits = bits * 0x2C1B3C6D
    bits = bits ^ ((bits >> 12) & 0xFFFFF)
    bits = bits * 0x297A2D39
    return bits ^ ((bits >> 15) & 0x1FFFF)


def uniform_numbers(counters: Tensor, key: Tensor) -> Tensor:
    """Returns a float32 number in [0, 1), a multiple of 2^-24, for each counter. Arguments as for ``random_bits``."""
    leading = (random_bits(counters, key) >> (32 - _NUM_BITS)) & (2**_NUM_BITS - 1)
    numbers: Tensor = leading.to(torch.float32) * 2.0**-_NUM_BITS
    return numbers


class UpdateKeys:
    """Computes the keys of all parameters of an optimizer once per update and keeps them on the device.

    Args:
        seed: seed of all keys.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._made_for: object = None
        self._table = torch.empty(0)

    def of(self, num_updates: int, number: int, count: int, device: torch.device) -> Tensor:
        """Returns the 0-d int32 key of parameter ``number`` of ``count`` after ``num_updates`` finished updates."""
        made_for = num_updates, count, device
        if made_for != self._made_for:
            keys = [[key_of(self._seed, num_updates, each)] + [0] * (_ROW - 1) for each in range(count)]
            self._table = torch.tensor(keys, dtype=torch.int32).to(device)
            self._made_for = made_for
        return self._table[number, 0]
