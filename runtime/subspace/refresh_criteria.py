"""When a basis has served its time: the criteria of a refresh, and what they measure.

    lazy    a weight's gap doubles while its subspace stays (Q-GaLore)
    lotus   a basis is renewed where the gradient's direction inside it has stopped moving

How much of a new gradient an old subspace still holds is 1 where nothing has changed. ``sketch_overlap`` and
``gradient_overlap`` weigh every direction by its energy, so neither the sign nor the order of the vectors matters, and
are corrected for what a random subspace would hold: 0 is chance. ``first_vector_cosine`` is the published one.

Source: Q-GaLore, Zhang et al. 2024, arXiv:2407.08296, section 3.2 (cosine between the first singular vectors of two
refreshes; its sign, which a singular vector does not have, is dropped here); the overlaps are ours. Lotus,
arXiv:2602.01233, algorithm 1.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from galore_fx.runtime.subspace.projection import ProjectedDim, project, wide_norm


class RefreshCriterion:
    """What decides that a basis is due. This one leaves it to the schedule.

    Attributes:
        saved: names of the attributes that a resumed run needs; each a mapping by weight.
        measures: whether a refresh says how stable its subspace was.
    """

    saved: ClassVar[tuple[str, ...]] = ()
    measures: ClassVar[bool] = False

    def due_of(
        self, scheduled: Sequence[int], weights: Iterable[int], num_updates: int, *, is_first: bool
    ) -> list[int]:
        """The weights that are due in the update that follows ``num_updates`` done ones.

        Args:
            scheduled: those whose turn it is by the schedule.
            weights: all of them, by their keys.
            num_updates: the same.
            is_first: whether this is one of the updates at the start, in which all refresh.
        """
        return list(scheduled)

    def saw_gradient(self, key: int, projected: Tensor, first: Tensor | None) -> None:
        """An update is about to consume a projected gradient."""

    def saw_refresh(self, key: int, stability: float) -> None:
        """A refresh has found the subspace so stable, where it ``measures``."""

    def finished(self, key: int) -> None:
        """The weight has a new basis."""

    def stats(self, names: Mapping[int, str]) -> dict[str, Any]:
        """Figures for ``stats()``, by the names of the weights."""
        return {}


@dataclasses.dataclass
class Displacement(RefreshCriterion):
    """Lotus's criterion, and where each weight stands.

    With d_1 the unit projected gradient after a new basis, and d_T that of T - 1 updates later, the basis is renewed at
    the first T that is a multiple of the interval with ``||d_T - d_1|| / T < threshold``. The distance is at most 2, so
    no basis outlives T = 2 / threshold by more than the interval.

    Source: Lotus, arXiv:2602.01233, algorithm 1. The text of the paper gives another criterion (a sum of directions);
    it is not built.

    Attributes:
        threshold: gamma, mean displacement of an update below which a basis is renewed.
        interval: eta, updates between two decisions.
        ages: T of each weight; one without has no first direction yet.
        used_up: weights that have met the criterion since the last ``take``.
    """

    saved = ("ages",)

    threshold: float
    interval: int
    ages: dict[int, int] = dataclasses.field(default_factory=dict)
    used_up: set[int] = dataclasses.field(default_factory=set)

    def note(self, key: int, projected: Tensor, first: Tensor) -> None:
        """Takes note of a gradient before it is consumed.

        Args:
            key: of the weight.
            projected: R, any shape.
            first: d_1, of the same shape; written where the basis is new.
        """
        age = self.ages[key] = self.ages.get(key, 0) + 1
        norm = wide_norm(projected)
        if age == 1:
            torch.div(projected, norm.clamp_min(torch.finfo(torch.float32).tiny), out=first)
        elif age % self.interval == 0:
            distance = torch.dist(projected.float() / norm, first.float())
            if float(distance) / age < self.threshold:
                self.used_up.add(key)

    def restart(self, key: int) -> None:
        """The weight has a new basis."""
        self.ages.pop(key, None)
        self.used_up.discard(key)

    def take(self) -> set[int]:
        """Those that have become due."""
        due, self.used_up = self.used_up, set()
        return due

    def due_of(
        self, scheduled: Sequence[int], weights: Iterable[int], num_updates: int, *, is_first: bool
    ) -> list[int]:
        """Those that are used up; at the start, those of the schedule."""
        if is_first:
            return list(scheduled)
        used_up = self.take()
        return [key for key in weights if key in used_up]

    def saw_gradient(self, key: int, projected: Tensor, first: Tensor | None) -> None:
        """As ``note``."""
        if first is not None:
            self.note(key, projected, first)

    def finished(self, key: int) -> None:
        """As ``restart``."""
        self.restart(key)


@dataclasses.dataclass
class LazyGaps(RefreshCriterion):
    """The gap of each weight: it doubles as long as the weight's subspace stays what it is.

    Source: Q-GaLore, Zhang et al. 2024, arXiv:2407.08296, section 3.2: where the mean of the last k statistics is above
    a threshold, the gap is doubled. Here it has a limit, and counts from the weight's last refresh.

    Attributes:
        base: the first gap, in updates.
        threshold: stability at or above which a gap doubles.
        queue_size: how many refreshes the mean is taken over; fewer decide nothing.
        largest: a gap is at most so many times the first.
        gaps: in force, by weight; those that are not in it have the first.
        last: the update at which each weight became due last.
        stabilities: of the last refreshes of each weight, the latest at the end.
    """

    saved = ("gaps", "last", "stabilities")
    measures = True

    base: int
    threshold: float
    queue_size: int
    largest: int
    gaps: dict[int, int] = dataclasses.field(default_factory=dict)
    last: dict[int, int] = dataclasses.field(default_factory=dict)
    stabilities: dict[int, list[float]] = dataclasses.field(default_factory=dict)

    def gap_of(self, key: int) -> int:
        """Updates between two refreshes of a weight."""
        return self.gaps.get(key, self.base)

    def is_due(self, key: int, num_updates: int) -> bool:
        """Whether as many updates have passed since its last refresh as its gap says."""
        return key not in self.last or num_updates - self.last[key] >= self.gap_of(key)

    def note(self, key: int, stability: float) -> None:
        """A refresh has found the subspace so stable."""
        recent = self.stabilities.setdefault(key, [])
        recent.append(stability)
        del recent[: -self.queue_size]
        gap = 2 * self.gap_of(key)
        is_stable = len(recent) == self.queue_size and sum(recent) / self.queue_size >= self.threshold
        if is_stable and gap <= self.largest * self.base:
            self.gaps[key] = gap

    def due_of(
        self, scheduled: Sequence[int], weights: Iterable[int], num_updates: int, *, is_first: bool
    ) -> list[int]:
        """Of those whose turn it is, the ones whose own gap is over."""
        due = [key for key in scheduled if is_first or self.is_due(key, num_updates)]
        # The updates at the start are one refresh, from which the gaps count.
        self.last.update(dict.fromkeys(due, 0 if is_first else num_updates))
        return due

    def saw_refresh(self, key: int, stability: float) -> None:
        """As ``note``."""
        self.note(key, stability)

    def stats(self, names: Mapping[int, str]) -> dict[str, Any]:
        """The gaps in force and the last measurements."""
        latest = {names[key]: values[-1] for key, values in self.stabilities.items()}
        return {"refresh_gap": {name: self.gap_of(key) for key, name in names.items()}, "stability": latest}


def sketch_overlap(old: Tensor, sketch: Tensor) -> float:
    """Share of the energy of a sketch ``G^T G P`` that lies in the span of P, corrected for chance.

    In 16 bits R is balanced before the sketch (bases.py), and a direction counts by its singular value squared and
    not to the fourth power: the share of a subspace that stays comes out somewhat lower, and bases are renewed sooner.

    Args:
        old: P, (n, r), orthonormal.
        sketch: (n, r).
    """
    sketch = sketch.float()
    held = (old.float().T @ sketch).square().sum() / sketch.square().sum()
    return _corrected(float(held), old.shape[1] / old.shape[0])


def gradient_overlap(grad: Tensor, old: Tensor, new: Tensor, dim: ProjectedDim) -> float:
    """Energy of a gradient in the old subspace by that in the new one, corrected for chance.

    Args:
        grad: G, (m, n).
        old, new: bases (m, r) or (n, r), orthonormal.
        dim: the projected dimension.
    """
    whole, before, after = map(_energy, (grad, project(grad, old, dim), project(grad, new, dim)))
    if after == 0.0:
        return 0.0
    return _corrected(before / after, whole * old.shape[1] / old.shape[0] / after)


def first_vector_cosine(old: Tensor, new: Tensor) -> float:
    """|cos| between the first columns of two bases."""
    return float(torch.nn.functional.cosine_similarity(old[:, 0].float(), new[:, 0].float(), dim=0).abs())


def _energy(tensor: Tensor) -> float:
    return float(wide_norm(tensor)) ** 2


def _corrected(share: float, chance: float) -> float:
    """0 where the share is what chance gives, 1 where it is whole."""
    return (share - chance) / (1 - chance) if chance < 1 else 1.0
