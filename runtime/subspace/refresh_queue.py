"""Schedules the refreshes of all bases.

Updates are counted from 0 (the number of finished updates), as in the reference: with a gap of 200 and one phase for
all layers, updates 0, 200, 400 refresh.

    same phase (gap 6, 3 layers)      staggered
    layer 0   x . . . . . x           x . . . . . x
    layer 1   x . . . . . x           x . x . . . . . x
    layer 2   x . . . . . x           x . . . x . . . . . x

With lazy refreshes a weight skips turns of its layer until its own gap has passed; the gap grows while its subspace is
stable.

If more layers are due than may refresh in one update, by number, bytes or seconds, the others wait. The layer that has
waited longest comes first, and no other overtakes it.
"""

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from galore_fx.runtime.subspace.refresh_criteria import RefreshCriterion

# One iteration from a random basis captures less energy than a second, warm iteration. Subspace iteration therefore
# refreshes all layers in the first two updates.
SUBSPACE_ITERATION_WARM_UP = 2


@dataclasses.dataclass(frozen=True)
class FixedSchedule:
    """Refreshes every basis each ``gap`` updates.

    Attributes:
        gap: updates between two refreshes of one basis.
        num_groups: number of groups of weights (layers).
        stagger: whether the groups have different phases.
        num_initial: number of initial updates in which all bases refresh.
        num_iterations: number of consecutive updates of one refresh.
    """

    gap: int
    num_groups: int
    stagger: bool
    num_initial: int
    num_iterations: int = 1

    def is_due(self, group: int, num_updates: int) -> bool:
        """Returns whether the weights of ``group`` are due in the update after ``num_updates`` finished ones."""
        if num_updates < self.num_initial:
            return True
        phase = group * self.gap // self.num_groups if self.stagger else 0
        return (num_updates - phase) % self.gap < self.num_iterations


@dataclasses.dataclass(frozen=True)
class RefreshCost:
    """Cost that renewing the bases of a layer adds to a step.

    Attributes:
        num_bytes: peak bytes.
        time_s: seconds.
    """

    num_bytes: int = 0
    time_s: float = 0.0

    def __add__(self, other: "RefreshCost") -> "RefreshCost":
        return RefreshCost(self.num_bytes + other.num_bytes, self.time_s + other.time_s)


@dataclasses.dataclass(frozen=True)
class RefreshLimits:
    """Limits of the refreshes in one update; None for no limit.

    Attributes:
        num_layers: number of layers.
        num_bytes: sum of their bytes.
        time_s: sum of their seconds.
    """

    num_layers: int | None = None
    num_bytes: int | None = None
    time_s: float | None = None

    def most_layers(self, costs: Sequence[RefreshCost]) -> int | None:
        """Returns the largest number of layers with these costs that can refresh together; None if all can."""
        sizes, times = sorted(cost.num_bytes for cost in costs), sorted(cost.time_s for cost in costs)
        for number in range(len(costs), 1, -1):
            if self.allow(number, RefreshCost(sum(sizes[:number]), sum(times[:number]))):
                return None if number == len(costs) else number
        return None if len(costs) <= 1 else 1

    def num_turns(self, costs: Iterable[RefreshCost]) -> int:
        """Returns how many updates it takes to refresh due layers of these costs once, in this order."""
        turns = number = 0
        total = RefreshCost()
        for cost in costs:
            number, total = number + 1, total + cost
            if turns == 0 or not self.allow(number, total):
                turns, number, total = turns + 1, 1, cost
        return turns

    def allow(self, num_layers: int, cost: RefreshCost) -> bool:
        """Returns whether this many layers with this total cost may refresh together."""
        limits = ((num_layers, self.num_layers), (cost.num_bytes, self.num_bytes), (cost.time_s, self.time_s))
        return all(limit is None or value <= limit for value, limit in limits)


class RefreshQueue:
    """Queue of the weights whose bases are due; selects the weights that refresh in the next update.

    The order is deterministic, earliest due first. No layer waits for ever: each update serves the layer that has
    waited longest, and as many after it, in order, as the limits allow. The first layer has its turn at any cost.

    Attributes:
        due_since: the update at which each waiting weight became due, by key.
        limits: limits of the refreshes in one update.
        criterion: decides together with the schedule which bases are due.

    Args:
        layers: the layer of each weight, by a key of the caller. The weights of a layer refresh together.
        schedule: schedule of the layers.
        limits, criterion: see Attributes; the default criterion follows the schedule.
        costs: refresh cost of each layer; zero for a layer without an entry.
    """

    def __init__(
        self,
        layers: Mapping[int, int],
        schedule: FixedSchedule,
        limits: RefreshLimits,
        criterion: RefreshCriterion | None = None,
        costs: Mapping[int, RefreshCost] | None = None,
    ) -> None:
        self.due_since: dict[int, int] = {}
        self.limits = limits
        self.criterion = criterion or RefreshCriterion()
        self._layers, self._schedule, self._costs = layers, schedule, costs or {}

    def admit(self, num_updates: int) -> None:
        """Enqueues the weights that are due in the update after ``num_updates`` finished ones."""
        scheduled = [key for key, layer in self._layers.items() if self._schedule.is_due(layer, num_updates)]
        is_first = num_updates < self._schedule.num_initial
        due = self.criterion.due_of(scheduled, self._layers, num_updates, is_first=is_first)
        self.request(due, num_updates)

    def request(self, keys: Iterable[int], num_updates: int) -> None:
        """Enqueues these weights unless they already wait."""
        for key in keys:
            self.due_since.setdefault(key, num_updates)

    def turn(self) -> set[int]:
        """Returns the keys of the weights that refresh in the next update."""
        layers = self.layers_in_turn()
        return {key for key in self.due_since if self._layers[key] in layers}

    def layers_in_turn(self) -> set[int]:
        """Returns the layers that refresh in the next update."""
        chosen: set[int] = set()
        total = RefreshCost()
        for layer in self.waiting():
            total += self.cost_of(layer)
            if chosen and not self.limits.allow(len(chosen) + 1, total):
                break
            chosen.add(layer)
        return chosen

    def cost_of(self, layer: int) -> RefreshCost:
        """Returns the cost that the refresh of a layer adds to a step."""
        return self._costs.get(layer, RefreshCost())

    def waiting(self) -> dict[int, int]:
        """Returns the waiting layers and the update since which each is due, longest waiting first."""
        waiting: dict[int, int] = {}
        for key, since in self.due_since.items():
            layer = self._layers[key]
            waiting[layer] = min(since, waiting.get(layer, since))
        return {layer: waiting[layer] for layer in sorted(waiting, key=lambda layer: (waiting[layer], layer))}

    def layer_of(self, key: int) -> int:
        """Returns the layer of a weight."""
        return self._layers[key]

    def measures(self, num_updates: int) -> bool:
        """Returns whether refreshes measure stability; the initial ones do not, as they start from random bases."""
        return self.criterion.measures and num_updates >= self._schedule.num_initial

    def finish(self, key: int) -> None:
        """Removes a weight that has its new basis."""
        self.due_since.pop(key, None)
        self.criterion.finished(key)

    def fail(self, key: int, num_updates: int) -> None:
        """Re-enqueues a failed weight behind the others, so that a NaN or missing gradient does not block them."""
        if key in self.due_since:
            self.due_since[key] = num_updates + 1

    def state(self, positions: Mapping[int, int]) -> dict[str, Any]:
        """Returns the state that a resumed run needs.

        Args:
            positions: index of each weight by key; the indices replace the keys.
        """

        def by_position(values: Mapping[int, Any]) -> dict[int, Any]:
            return {positions[key]: value for key, value in sorted(values.items(), key=lambda item: positions[item[0]])}

        saved = {"due_since": by_position(self.due_since)}
        return saved | {name: by_position(getattr(self.criterion, name)) for name in self.criterion.saved}

    def load_state(self, saved: Mapping[str, Any], keys: Sequence[int]) -> None:
        """Restores a saved state.

        Args:
            saved: a result of ``state``.
            keys: key of the weight at each index.
        """
        self.due_since = {keys[i]: since for i, since in saved["due_since"].items()}
        for name in self.criterion.saved:
            setattr(self.criterion, name, {keys[i]: copy.copy(value) for i, value in saved.get(name, {}).items()})
