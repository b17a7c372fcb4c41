"""When each basis is renewed.

Updates are counted from 0 (the number already done), as in the reference: with a gap of 200 and the same phase for
all, updates 0, 200, 400 refresh.

    same phase (gap 6, 3 layers)      staggered
    layer 0   x . . . . . x           x . . . . . x
    layer 1   x . . . . . x           x . x . . . . . x
    layer 2   x . . . . . x           x . . . x . . . . . x

Where more layers are due than may refresh in one update, the others wait, the one that has waited longest comes first.
"""

import dataclasses
from collections.abc import Iterable, Mapping

# A random first basis and one iteration catch less than a second warm iteration does, so subspace iteration
# refreshes all layers in the first two updates.
SUBSPACE_ITERATION_WARM_UP = 2


@dataclasses.dataclass(frozen=True)
class FixedSchedule:
    """Every basis each ``gap`` updates.

    Attributes:
        gap: updates between two refreshes of one basis.
        num_groups: how many groups of weights (layers) take turns.
        stagger: give the groups different phases.
        num_initial: updates at the start in which all refresh.
    """

    gap: int
    num_groups: int
    stagger: bool
    num_initial: int

    def is_due(self, group: int, num_updates: int) -> bool:
        """Whether the weights of ``group`` refresh in the update that follows ``num_updates`` done ones."""
        if num_updates < self.num_initial:
            return True
        phase = group * self.gap // self.num_groups if self.stagger else 0
        return (num_updates - phase) % self.gap == 0


class RefreshQueue:
    """The weights whose bases are due, and whose turn it is.

    Deterministic, and none waits for ever: a layer that is due has its turn within (number of layers / limit) updates,
    rounded up.

    Attributes:
        due_since: the update at which each weight became due that waits.
        limit: how many layers may refresh in the same update; None: all that are due.

    Args:
        layers: the layer of each weight, by a key of the caller's. The weights of a layer refresh together.
        schedule: when a layer is due.
        limit: the same.
    """

    def __init__(self, layers: Mapping[int, int], schedule: FixedSchedule, limit: int | None) -> None:
        self.due_since: dict[int, int] = {}
        self.limit = limit
        self._layers, self._schedule = layers, schedule

    def admit(self, num_updates: int) -> None:
        """Lets those wait that are due in the update that follows ``num_updates`` done ones."""
        self.request(
            (key for key, layer in self._layers.items() if self._schedule.is_due(layer, num_updates)), num_updates
        )

    def request(self, keys: Iterable[int], num_updates: int) -> None:
        """Lets these wait, if they do not already."""
        for key in keys:
            self.due_since.setdefault(key, num_updates)

    def turn(self) -> set[int]:
        """The weights that refresh in the next update."""
        if self.limit is None:
            return set(self.due_since)
        waiting: dict[int, int] = {}
        for key, since in self.due_since.items():
            layer = self._layers[key]
            waiting[layer] = min(since, waiting.get(layer, since))
        first = sorted(waiting, key=lambda layer: (waiting[layer], layer))[: self.limit]
        return {key for key in self.due_since if self._layers[key] in first}

    def finish(self, key: int) -> None:
        """It has its new basis."""
        self.due_since.pop(key, None)

    def fail(self, key: int, num_updates: int) -> None:
        """It has not got one, and waits again behind the others, which a gradient of NaN would else hold up."""
        if key in self.due_since:
            self.due_since[key] = num_updates + 1
