"""Rounding of weights in 16 and 8 bits: the random keys, and the measured movement."""

from collections.abc import Mapping

from torch import Tensor, nn

from galore_fx.runtime.counters import Counters
from galore_fx.runtime.formats.counter_rng import UpdateKeys
from galore_fx.runtime.formats.quantized_tensor import QuantizedTensor
from galore_fx.runtime.formats.rounding import rounds_by_chance
from galore_fx.runtime.step.realised_movement import NUM_FIRST_UPDATES, MovementProbe, RealisedMovement


def is_narrow(parameter: nn.Parameter) -> bool:
    """Returns whether a weight is stored in 16 or 8 bits, so that an update may be below a step of its grid."""
    return isinstance(parameter, QuantizedTensor) or rounds_by_chance(parameter.dtype)


class WeightRounding:
    """Rounding of one optimizer's weights.

    Attributes:
        movement: measures the realised share of the intended movement.

    Args:
        seed: seed of the random numbers; None to round to nearest.
        numbers: index of each parameter, by its ``id``; a parameter that is added later gets the next index.
        counters: counters of the optimizer.
    """

    def __init__(self, seed: int | None, numbers: Mapping[int, int], counters: Counters) -> None:
        self.movement = RealisedMovement()
        self._keys = None if seed is None else UpdateKeys(seed)
        self._numbers, self._counters = numbers, counters

    def key(self, parameter: nn.Parameter) -> Tensor | None:
        """Returns the 0-d int32 key of a parameter for this update; a resumed run gets the same key.

        Returns None if the weight is not narrow or is rounded to nearest.
        """
        if self._keys is None or not is_narrow(parameter):
            return None
        number, count = self._numbers[id(parameter)], len(self._numbers)
        return self._keys.of(self._counters.num_updates, number, count, parameter.device)

    def probe(self, parameter: nn.Parameter, *, projected: bool) -> MovementProbe | None:
        """Returns the movement probe for this update of a parameter; None if the update is not sampled."""
        if not is_narrow(parameter):
            return None
        kind = "projected" if projected else "full_rank"
        return self.movement.probe(kind, self._counters.num_updates, self._numbers[id(parameter)])

    def after_update(self) -> None:
        """Warns once if rounding to nearest loses movement; called after each update."""
        if self._keys is None and self._counters.num_updates == NUM_FIRST_UPDATES:
            self.movement.warn_of_loss()
