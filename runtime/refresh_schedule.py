"""When each basis is renewed.

Updates are counted from 0 (the number already done), as in the reference: with a gap of 200 and the same phase for
all, updates 0, 200, 400 refresh.

    same phase (gap 6, 3 layers)      staggered
    layer 0   x . . . . . x           x . . . . . x
    layer 1   x . . . . . x           x . x . . . . . x
    layer 2   x . . . . . x           x . . . x . . . . . x
"""

import dataclasses

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
