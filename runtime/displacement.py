"""When a subspace has been used up: the gradient's direction inside it does not move any more.

Source: Lotus, arXiv:2602.01233, algorithm 1. With d_1 the unit projected gradient after a new basis, and d_T that
of T - 1 updates later, the basis is renewed at the first T that is a multiple of the interval with
``||d_T - d_1|| / T < threshold``. The distance is at most 2, so no basis outlives T = 2 / threshold by more than the
interval. The text of the paper gives another criterion (a sum of directions); it is not built.
"""

import dataclasses

import torch
from torch import Tensor

from galore_fx.runtime.wide_norm import wide_norm


@dataclasses.dataclass
class Displacement:
    """The criterion, and where each weight stands.

    Attributes:
        threshold: gamma, mean displacement of an update below which a basis is renewed.
        interval: eta, updates between two decisions.
        ages: T of each weight; one without has no first direction yet.
        due: weights that have met the criterion since the last ``take``.
    """

    threshold: float
    interval: int
    ages: dict[int, int] = dataclasses.field(default_factory=dict)
    due: set[int] = dataclasses.field(default_factory=set)

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
                self.due.add(key)

    def restart(self, key: int) -> None:
        """The weight has a new basis."""
        self.ages.pop(key, None)
        self.due.discard(key)

    def take(self) -> set[int]:
        """Those that have become due."""
        due, self.due = self.due, set()
        return due
