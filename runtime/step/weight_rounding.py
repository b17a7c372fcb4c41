"""How an optimizer's weights of 16 and 8 bits are rounded: by which random numbers, and what movement they make."""

from collections.abc import Mapping

from torch import Tensor, nn

from galore_fx.runtime.counters import Counters
from galore_fx.runtime.formats.counter_rng import UpdateKeys
from galore_fx.runtime.formats.quantized_tensor import QuantizedTensor
from galore_fx.runtime.formats.rounding import rounds_by_chance
from galore_fx.runtime.step.realised_movement import NUM_FIRST_UPDATES, MovementProbe, RealisedMovement


def is_narrow(parameter: nn.Parameter) -> bool:
    """Whether a weight is stored in 16 or 8 bits, in which an update may be smaller than a step of the grid."""
    return isinstance(parameter, QuantizedTensor) or rounds_by_chance(parameter.dtype)


class WeightRounding:
    """That of one optimizer.

    Attributes:
        movement: what has been made of the movement that was intended.

    Args:
        seed: of the random numbers, None to round to the nearest.
        numbers: the position of each parameter, by its identity; one that is added later has the next.
        counters: of the optimizer.
    """

    def __init__(self, seed: int | None, numbers: Mapping[int, int], counters: Counters) -> None:
        self.movement = RealisedMovement()
        self._keys = None if seed is None else UpdateKeys(seed)
        self._numbers, self._counters = numbers, counters

    def key(self, parameter: nn.Parameter) -> Tensor | None:
        """0-d int32: another one for each parameter and update, and the same in a run that is resumed.

        None where the weight is not narrow, or is rounded to the nearest.
        """
        if self._keys is None or not is_narrow(parameter):
            return None
        number, count = self._numbers[id(parameter)], len(self._numbers)
        return self._keys.of(self._counters.num_updates, number, count, parameter.device)

    def probe(self, parameter: nn.Parameter, *, projected: bool) -> MovementProbe | None:
        """What looks at this update of a parameter; None where it is not looked at."""
        if not is_narrow(parameter):
            return None
        kind = "projected" if projected else "full_rank"
        return self.movement.probe(kind, self._counters.num_updates, self._numbers[id(parameter)])

    def after_update(self) -> None:
        """Called after each update: where weights are rounded to the nearest, says once that movement is lost."""
        if self._keys is None and self._counters.num_updates == NUM_FIRST_UPDATES:
            self.movement.warn_of_loss()
