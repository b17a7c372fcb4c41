"""When each basis is renewed.

Updates are counted from 0 (the number already done), as in the reference: with a gap of 200 and the same phase for
all, updates 0, 200, 400 refresh.

    same phase (gap 6, 3 layers)      staggered
    layer 0   x . . . . . x           x . . . . . x
    layer 1   x . . . . . x           x . x . . . . . x
    layer 2   x . . . . . x           x . . . x . . . . . x

Lazily, a weight lets turns of its layer pass until its own gap is over, which grows while its subspace stays.

Where more layers are due than may refresh in one update, by their number, bytes or seconds, the others wait; the one
that has waited longest comes first, and none overtakes it.
"""

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from galore_fx.runtime.subspace.refresh_criteria import RefreshCriterion

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
        num_iterations: updates in a row in which a refresh goes on.
    """

    gap: int
    num_groups: int
    stagger: bool
    num_initial: int
    num_iterations: int = 1

    def is_due(self, group: int, num_updates: int) -> bool:
        """Whether the weights of ``group`` refresh in the update that follows ``num_updates`` done ones."""
        if num_updates < self.num_initial:
            return True
        phase = group * self.gap // self.num_groups if self.stagger else 0
        return (num_updates - phase) % self.gap < self.num_iterations


@dataclasses.dataclass(frozen=True)
class RefreshCost:
    """What renewing the bases of a layer adds to a step.

    Attributes:
        num_bytes: at its highest.
        time_s: seconds.
    """

    num_bytes: int = 0
    time_s: float = 0.0

    def __add__(self, other: "RefreshCost") -> "RefreshCost":
        return RefreshCost(self.num_bytes + other.num_bytes, self.time_s + other.time_s)


@dataclasses.dataclass(frozen=True)
class RefreshLimits:
    """What may refresh in one update, None for no limit.

    Attributes:
        num_layers: how many layers.
        num_bytes, time_s: the sum of their costs.
    """

    num_layers: int | None = None
    num_bytes: int | None = None
    time_s: float | None = None

    def most_layers(self, costs: Sequence[RefreshCost]) -> int | None:
        """How many layers may ever refresh together, where these are their costs; None where all may."""
        sizes, times = sorted(cost.num_bytes for cost in costs), sorted(cost.time_s for cost in costs)
        for number in range(len(costs), 1, -1):
            if self.allow(number, RefreshCost(sum(sizes[:number]), sum(times[:number]))):
                return None if number == len(costs) else number
        return None if len(costs) <= 1 else 1

    def num_turns(self, costs: Iterable[RefreshCost]) -> int:
        """Updates in which layers of these costs, all of them due, refresh once, in this order."""
        turns = number = 0
        total = RefreshCost()
        for cost in costs:
            number, total = number + 1, total + cost
            if turns == 0 or not self.allow(number, total):
                turns, number, total = turns + 1, 1, cost
        return turns

    def allow(self, num_layers: int, cost: RefreshCost) -> bool:
        """Whether so many layers of this cost may refresh together."""
        limits = ((num_layers, self.num_layers), (cost.num_bytes, self.num_bytes), (cost.time_s, self.time_s))
        return all(limit is None or value <= limit for value, limit in limits)


class RefreshQueue:
    """The weights whose bases are due, and whose turn it is.

    Earliest deadline first, and deterministic. None waits for ever: each update serves the layer that has waited
    longest, and as many behind it, in order, as the limits allow; a layer that is alone has its turn whatever it costs.

    Attributes:
        due_since: the update at which each weight became due that waits.
        limits: of what may refresh in the same update.
        criterion: decides with the schedule which bases are due.

    Args:
        layers: the layer of each weight, by a key of the caller's. The weights of a layer refresh together.
        schedule: when a layer is due.
        limits, criterion: the same.
        costs: of each layer; nothing where a layer has none.
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
        """Lets those wait that are due in the update that follows ``num_updates`` done ones."""
        scheduled = [key for key, layer in self._layers.items() if self._schedule.is_due(layer, num_updates)]
        is_first = num_updates < self._schedule.num_initial
        due = self.criterion.due_of(scheduled, self._layers, num_updates, is_first=is_first)
        self.request(due, num_updates)

    def request(self, keys: Iterable[int], num_updates: int) -> None:
        """Lets these wait, if they do not already."""
        for key in keys:
            self.due_since.setdefault(key, num_updates)

    def turn(self) -> set[int]:
        """The weights that refresh in the next update."""
        layers = self.layers_in_turn()
        return {key for key in self.due_since if self._layers[key] in layers}

    def layers_in_turn(self) -> set[int]:
        """Their layers."""
        chosen: set[int] = set()
        total = RefreshCost()
        for layer in self.waiting():
            total += self.cost_of(layer)
            if chosen and not self.limits.allow(len(chosen) + 1, total):
                break
            chosen.add(layer)
        return chosen

    def cost_of(self, layer: int) -> RefreshCost:
        """What its refresh adds to a step."""
        return self._costs.get(layer, RefreshCost())

    def waiting(self) -> dict[int, int]:
        """The layers that are due and since which update, the one that has waited longest first."""
        waiting: dict[int, int] = {}
        for key, since in self.due_since.items():
            layer = self._layers[key]
            waiting[layer] = min(since, waiting.get(layer, since))
        return {layer: waiting[layer] for layer in sorted(waiting, key=lambda layer: (waiting[layer], layer))}

    def layer_of(self, key: int) -> int:
        """The layer of a weight."""
        return self._layers[key]

    def measures(self, num_updates: int) -> bool:
        """Whether a refresh says how stable its subspace was: not the first ones, which start from random bases."""
        return self.criterion.measures and num_updates >= self._schedule.num_initial

    def finish(self, key: int) -> None:
        """It has its new basis."""
        self.due_since.pop(key, None)
        self.criterion.finished(key)

    def fail(self, key: int, num_updates: int) -> None:
        """It has not got one, and waits again behind the others, which a gradient of NaN, or none, would hold up."""
        if key in self.due_since:
            self.due_since[key] = num_updates + 1

    def state(self, positions: Mapping[int, int]) -> dict[str, Any]:
        """What a resumed run needs, with the position of each weight in the place of its key."""

        def by_position(values: Mapping[int, Any]) -> dict[int, Any]:
            return {positions[key]: value for key, value in sorted(values.items(), key=lambda item: positions[item[0]])}

        saved = {"due_since": by_position(self.due_since)}
        return saved | {name: by_position(getattr(self.criterion, name)) for name in self.criterion.saved}

    def load_state(self, saved: Mapping[str, Any], keys: Sequence[int]) -> None:
        """Goes on from a state.

        Args:
            saved: what ``state`` returned.
            keys: the weight at each position.
        """
        self.due_since = {keys[i]: since for i, since in saved["due_since"].items()}
        for name in self.criterion.saved:
            setattr(self.criterion, name, {keys[i]: copy.copy(value) for i, value in saved.get(name, {}).items()})
