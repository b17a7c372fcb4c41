"""Chooses the share of its activations that each block keeps: the fastest choice whose peak fits.

The alternatives of a block are points of AOTAutograd's memory budget. Simulated steps give the saved bytes, the bytes
while the block runs, and the time of each. Live at an event are the bytes saved by the blocks that have run forward,
the bytes of the running block, and the rest. All are sums over 0/1 choices, so the choice is a mixed-integer linear
program, which HiGHS solves exactly. The peak of a block is not monotone in its budget, so no alternative is excluded
beforehand.
"""

import dataclasses
from collections.abc import Sequence

import numpy

Choice = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class MomentBytes:
    """Bytes alive at one event of a step.

    Attributes:
        saving: blocks whose saved activations are alive, each with its saved bytes by alternative.
        running: the running block; None between blocks.
        num_bytes: all other live bytes, by alternative of the running block; one entry if no block runs.
    """

    saving: tuple[tuple[int, tuple[int, ...]], ...]
    running: int | None
    num_bytes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class PolicyProblem:
    """The events of a step whose bytes must fit, and the time of each alternative.

    Attributes:
        seconds: time of each block's forward and backward, by block and alternative.
        moments: the events whose live bytes must fit.
    """

    seconds: tuple[tuple[float, ...], ...]
    moments: tuple[MomentBytes, ...]

    def peak(self, choice: Choice) -> int:
        """Returns the peak in bytes under a choice of one alternative per block."""
        return max((self._bytes(moment, choice) for moment in self.moments), default=0)

    def time(self, choice: Choice) -> float:
        """Returns the seconds that all blocks take under a choice."""
        return sum(row[option] for row, option in zip(self.seconds, choice, strict=True))

    def _bytes(self, moment: MomentBytes, choice: Choice) -> int:
        own = moment.num_bytes[0 if moment.running is None else choice[moment.running]]
        return own + sum(sizes[choice[block]] for block, sizes in moment.saving)


def fastest_within(problem: PolicyProblem, limit_bytes: int) -> Choice | None:
    """Returns the fastest choice whose peak is at most ``limit_bytes``; None if the solver gives none."""
    program = _Program(problem)
    limit = limit_bytes
    # The solver works in floating point: if a choice slightly exceeds the limit, it runs again with a lower one.
    for _ in range(_MAX_NUM_CORRECTIONS):
        choice = program.solve(limit)
        if choice is None:
            return None
        excess = problem.peak(choice) - limit_bytes
        if excess <= 0:
            return choice
        limit -= excess
    return None


def least_peak(problem: PolicyProblem) -> Choice:
    """Returns the choice with the lowest peak."""
    choice = _Program(problem).solve(None)
    assert choice is not None, "without a limit any choice will do"
    return choice


_MAX_NUM_CORRECTIONS = 8
_SCALE = 1e4  # the scaled bytes of the largest event, so that the solver's tolerance of 1e-6 is negligible


class _Program:
    """The mixed-integer program, with one 0/1 variable per block and alternative and the peak as the last variable."""

    def __init__(self, problem: PolicyProblem) -> None:
        self._sizes = [len(row) for row in problem.seconds]
        self._offsets = numpy.concatenate([[0], numpy.cumsum(self._sizes)]).astype(int)
        self._seconds = [value for row in problem.seconds for value in row]
        self._num_variables = len(self._seconds) + 1
        largest = max(max(m.num_bytes) + sum(max(sizes) for _, sizes in m.saving) for m in problem.moments)
        self._unit = max(1.0, largest / _SCALE)
        self._rows, self._columns, self._values = self._entries(problem)
        self._num_moments = len(problem.moments)

    def solve(self, limit_bytes: int | None) -> Choice | None:
        """Returns the fastest choice within a limit, or None; without a limit the choice with the lowest peak."""
        from scipy.optimize import Bounds, LinearConstraint, milp  # takes 0.2 s, and most plans need no solver
        from scipy.sparse import csr_array

        num_blocks = len(self._sizes)
        blocks = [block for block, size in enumerate(self._sizes) for _ in range(size)]
        ones = csr_array(
            (numpy.ones(len(blocks)), (blocks, range(len(blocks)))), shape=(num_blocks, self._num_variables)
        )
        objective = numpy.zeros(self._num_variables)
        upper = numpy.ones(self._num_variables)
        if limit_bytes is None:
            objective[-1], upper[-1] = 1.0, numpy.inf
        else:
            objective[:-1] = self._seconds
            objective /= max(objective.max(), 1e-30)
            upper[-1] = limit_bytes / self._unit
            if upper[-1] < 0:
                return None
        shape = self._num_moments, self._num_variables
        moments = csr_array((self._values, (self._rows, self._columns)), shape=shape)
        integrality = numpy.ones(self._num_variables)
        integrality[-1] = 0
        found = milp(
            objective,
            integrality=integrality,
            bounds=Bounds(numpy.zeros(self._num_variables), upper),
            constraints=[LinearConstraint(ones, 1.0, 1.0), LinearConstraint(moments, -numpy.inf, 0.0)],
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            return None
        return tuple(
            int(numpy.argmax(found.x[start:end]))
            for start, end in zip(self._offsets[:-1], self._offsets[1:], strict=True)
        )

    def _entries(self, problem: PolicyProblem) -> tuple[list[int], list[int], list[float]]:
        """Returns sparse constraints, one row per event: its bytes minus the peak must not be positive."""
        rows: list[int] = []
        columns: list[int] = []
        values: list[float] = []

        def add(row: int, block: int, sizes: Sequence[float]) -> None:
            rows.extend([row] * len(sizes))
            columns.extend(range(self._offsets[block], self._offsets[block] + len(sizes)))
            values.extend(size / self._unit for size in sizes)

        for number, moment in enumerate(problem.moments):
            for block, sizes in moment.saving:
                add(number, block, sizes)
            if moment.running is not None:
                add(number, moment.running, moment.num_bytes)
            else:
                add(number, 0, moment.num_bytes * self._sizes[0])  # exactly one of the first block's is chosen
            rows.append(number)
            columns.append(self._num_variables - 1)
            values.append(-1.0)
        return rows, columns, values
