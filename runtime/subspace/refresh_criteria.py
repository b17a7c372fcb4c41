"""Refresh criteria, and the measures of subspace stability that they use.

    lazy    the gap of a weight doubles while its subspace is stable (Q-GaLore)
    lotus   a basis is renewed when the gradient's direction inside it has stopped moving

Stability is the share of a new gradient in the old subspace: 1 if nothing has changed. ``sketch_overlap`` and
``gradient_overlap`` weight every direction by its energy, so they ignore sign and order of the vectors. They are
corrected for the share of a random subspace: 0 is chance level. ``first_vector_cosine`` is the published measure.

Source: Q-GaLore, Zhang et al. 2024, arXiv:2407.08296, section 3.2 (cosine between the first singular vectors of two
refreshes; the sign is dropped here, because it is arbitrary for a singular vector); the overlaps are ours. Lotus,
arXiv:2602.01233, algorithm 1.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from galore_fx.runtime.subspace.projection import ProjectedDim, project, wide_norm


class RefreshCriterion:
    """Decides which bases are due. This base class follows the schedule.

    Attributes:
        saved: names of the attributes that a resumed run needs; each is a mapping by weight.
        measures: whether each refresh must report the stability of the subspace.
    """

    saved: ClassVar[tuple[str, ...]] = ()
    measures: ClassVar[bool] = False

    def due_of(
        self, scheduled: Sequence[int], weights: Iterable[int], num_updates: int, *, is_first: bool
    ) -> list[int]:
        """Returns the keys of the weights that become due.

        Args:
            scheduled: keys of the weights that are due by the schedule.
            weights: keys of all weights.
            num_updates: number of finished updates.
            is_first: whether this is one of the initial updates, in which all bases refresh.
        """
        return list(scheduled)

    def saw_gradient(self, key: int, projected: Tensor, first: Tensor | None) -> None:
        """Called before an update consumes a projected gradient.

        Args:
            key: key of the weight.
            projected: R.
            first: ``first_direction`` of the record, the shape of R; None if the recipe keeps none.
        """

    def saw_refresh(self, key: int, stability: float) -> None:
        """Called with the stability of the subspace at a refresh, if ``measures``; 1 is unchanged, 0 chance level."""

    def finished(self, key: int) -> None:
        """Called when the weight has a new basis."""

    def stats(self, names: Mapping[int, str]) -> dict[str, Any]:
        """Returns entries for ``stats()``; ``names`` maps the keys of the weights to their names."""
        return {}


@dataclasses.dataclass
class Displacement(RefreshCriterion):
    """Lotus's displacement criterion, with its state for each weight.

    Let d_1 be the unit projected gradient after a new basis, and d_T the one T - 1 updates later. The basis is renewed
    at the first multiple T of the interval with ``||d_T - d_1|| / T < threshold``. The distance is at most 2, so no
    basis outlives T = 2 / threshold by more than the interval.

    Source: Lotus, arXiv:2602.01233, algorithm 1. The text of the paper gives another criterion (a sum of directions),
    which is not implemented.

    Attributes:
        threshold: gamma, mean displacement per update below which a basis is renewed.
        interval: eta, updates between two checks.
        ages: T of each weight; a weight without an entry has no first direction yet.
        used_up: weights that have met the criterion since the last ``take``.
    """

    saved = ("ages",)

    threshold: float
    interval: int
    ages: dict[int, int] = dataclasses.field(default_factory=dict)
    used_up: set[int] = dataclasses.field(default_factory=set)

    def note(self, key: int, projected: Tensor, first: Tensor) -> None:
        """Records a gradient before it is consumed and checks the criterion.

        Args:
            key: key of the weight.
            projected: R, any shape.
            first: d_1, the same shape; written if the basis is new.
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
        """Forgets the age of a weight that has a new basis."""
        self.ages.pop(key, None)
        self.used_up.discard(key)

    def take(self) -> set[int]:
        """Returns the weights that have met the criterion, and forgets them."""
        due, self.used_up = self.used_up, set()
        return due

    def due_of(
        self, scheduled: Sequence[int], weights: Iterable[int], num_updates: int, *, is_first: bool
    ) -> list[int]:
        """Returns the weights that have met the criterion; in the initial updates, the scheduled ones."""
        if is_first:
            return list(scheduled)
        used_up = self.take()
        return [key for key in weights if key in used_up]

    def saw_gradient(self, key: int, projected: Tensor, first: Tensor | None) -> None:
        """Calls ``note`` if there is a first direction."""
        if first is not None:
            self.note(key, projected, first)

    def finished(self, key: int) -> None:
        """Calls ``restart``."""
        self.restart(key)


@dataclasses.dataclass
class LazyGaps(RefreshCriterion):
    """Q-GaLore's lazy refresh: the gap of a weight doubles while its subspace is stable.

    Source: Q-GaLore, Zhang et al. 2024, arXiv:2407.08296, section 3.2: the gap is doubled if the mean of the last k
    statistics is above a threshold. Here the gap is limited, and counts from the update at which the weight was due.

    Attributes:
        base: initial gap, in updates.
        threshold: mean stability at or above which a gap doubles.
        queue_size: number of refreshes in the mean; with fewer the gap does not change.
        largest: upper limit of a gap, as a multiple of ``base``.
        gaps: current gap by weight; weights without an entry have ``base``.
        last: the update at which each weight was last due.
        stabilities: stabilities of the last refreshes of each weight, latest last.
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
        """Returns the current gap of a weight, in updates."""
        return self.gaps.get(key, self.base)

    def is_due(self, key: int, num_updates: int) -> bool:
        """Returns whether the gap of a weight has passed since it was last due."""
        return key not in self.last or num_updates - self.last[key] >= self.gap_of(key)

    def note(self, key: int, stability: float) -> None:
        """Records the stability measured at a refresh, and doubles the gap if the mean is high enough."""
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
        """Returns the scheduled weights whose own gap has passed; in the initial updates, all scheduled ones."""
        due = [key for key in scheduled if is_first or self.is_due(key, num_updates)]
        # The initial updates count as one refresh, at update 0.
        self.last.update(dict.fromkeys(due, 0 if is_first else num_updates))
        return due

    def saw_refresh(self, key: int, stability: float) -> None:
        """Calls ``note``."""
        self.note(key, stability)

    def stats(self, names: Mapping[int, str]) -> dict[str, Any]:
        """Returns the current gaps and the latest stabilities, by the names of the weights."""
        latest = {names[key]: values[-1] for key, values in self.stabilities.items()}
        return {"refresh_gap": {name: self.gap_of(key) for key, name in names.items()}, "stability": latest}


def sketch_overlap(old: Tensor, sketch: Tensor) -> float:
    """Returns the share of the energy of a sketch ``G^T G P`` in the span of P, corrected for chance.

    In 16 bits R is balanced before the sketch (bases.py). A direction is then weighted by its singular value squared
    instead of to the fourth power, so a stable subspace measures somewhat lower, and bases are renewed sooner.

    Args:
        old: P, (n, r), orthonormal.
        sketch: (n, r), or (n, r + p) with oversampling.
    """
    sketch = sketch.float()
    held = (old.float().T @ sketch).square().sum() / sketch.square().sum()
    return _corrected(float(held), old.shape[1] / old.shape[0])


def gradient_overlap(grad: Tensor, old: Tensor, new: Tensor, dim: ProjectedDim) -> float:
    """Returns the energy of a gradient in the old subspace relative to the new one, corrected for chance.

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
    """Returns |cos| between the first columns of two bases."""
    return float(torch.nn.functional.cosine_similarity(old[:, 0].float(), new[:, 0].float(), dim=0).abs())


def _energy(tensor: Tensor) -> float:
    return float(wide_norm(tensor)) ** 2


def _corrected(share: float, chance: float) -> float:
    """Maps a share linearly: chance level to 0, 1 to 1."""
    return (share - chance) / (1 - chance) if chance < 1 else 1.0
