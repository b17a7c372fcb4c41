"""Which share of its activations each block keeps: the fastest choice with which every moment of a step fits.

The alternatives of a block are points of AOTAutograd's memory budget; what each saves, needs while it runs and costs in
time comes from simulated steps. A moment holds what the blocks that have run forward have saved, what the running block
needs, and the rest. Those are sums over 0/1 choices, so the choice is a mixed-integer linear program, solved exactly by
HiGHS. The peak of a block is not monotone in its budget, so no alternative is left out beforehand.
"""

import dataclasses
from collections.abc import Sequence

import numpy

Choice = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class MomentBytes:
    """One moment of a step.

    Attributes:
        saving: blocks whose saved activations are alive, each with their bytes by alternative.
        running: the block that runs, None between blocks.
        num_bytes: all other bytes that are alive, for each alternative of the running block; one entry without one.
    """

    saving: tuple[tuple[int, tuple[int, ...]], ...]
    running: int | None
    num_bytes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class PolicyProblem:
    """The moments of a step, and what they and its duration depend on.

    Attributes:
        seconds: time of each block's forward and backward, by block and alternative.
        moments: what must fit.
    """

    seconds: tuple[tuple[float, ...], ...]
    moments: tuple[MomentBytes, ...]

    def peak(self, choice: Choice) -> int:
        """Bytes of the highest moment under a choice of one alternative per block."""
        return max((self._bytes(moment, choice) for moment in self.moments), default=0)

    def time(self, choice: Choice) -> float:
        """Seconds that all blocks take under a choice."""
        return sum(row[option] for row, option in zip(self.seconds, choice, strict=True))

    def _bytes(self, moment: MomentBytes, choice: Choice) -> int:
        own = moment.num_bytes[0 if moment.running is None else choice[moment.running]]
        return own + sum(sizes[choice[block]] for block, sizes in moment.saving)


def fastest_within(problem: PolicyProblem, limit_bytes: int) -> Choice | None:
    """The choice of least time whose peak is at most ``limit_bytes``; None where there is none."""
    program = _Program(problem)
    limit = limit_bytes
    # The solver's arithmetic is floating point: what it lets through by a hair is sent back with a lower limit.
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
    """The choice of the lowest peak."""
    choice = _Program(problem).solve(None)
    assert choice is not None, "without a limit any choice will do"
    return choice


_MAX_NUM_CORRECTIONS = 8
_SCALE = 1e4  # of the largest moment, so that the solver's tolerance of 1e-6 is far below what matters


class _Program:
    """The mixed-integer program: one 0/1 variable per block and alternative, and the peak as the last variable."""

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
        """The fastest choice below a limit, or without a limit the one of the lowest peak."""
        from scipy.optimize import Bounds, LinearConstraint, milp  # a fifth of a second, and most plans need no solver
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
        """One row per moment: its bytes less the peak, which must not be positive."""
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
                add(number, 0, moment.num_bytes * self._sizes[0])  # one of the first block's is always chosen
            rows.append(number)
            columns.append(self._num_variables - 1)
            values.append(-1.0)
        return rows, columns, values
