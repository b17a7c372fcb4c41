"""The solver of the activation policy against trying everything."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galore_fx.passes.memory_plan.activation_policy import MomentBytes, PolicyProblem, fastest_within, least_peak

SIZES = st.integers(0, 10**11)


@st.composite
def problems(draw):
    """Up to eight blocks that run forward one after the other and backward in reverse."""
    num_options = draw(st.integers(1, 3))
    num_blocks = draw(st.integers(1, 8 if num_options < 3 else 6))
    per_option = lambda value: st.tuples(*[value] * num_options)  # noqa: E731
    saved = tuple(draw(per_option(SIZES)) for _ in range(num_blocks))
    seconds = tuple(draw(per_option(st.integers(0, 1000).map(float))) for _ in range(num_blocks))
    moments = [MomentBytes(tuple(enumerate(saved)), None, (draw(SIZES),))]
    for block in range(num_blocks):
        for _ in range(2):
            moments.append(MomentBytes(tuple(enumerate(saved[:block])), block, draw(per_option(SIZES))))
    return PolicyProblem(seconds, tuple(moments))


def every_choice(problem):
    return itertools.product(*(range(len(row)) for row in problem.seconds))


@settings(max_examples=60, deadline=None)
@given(problems(), st.floats(0.3, 1.2))
def test_the_solver_equals_brute_force(problem, share):
    lowest = min(problem.peak(choice) for choice in every_choice(problem))
    assert problem.peak(least_peak(problem)) == pytest.approx(lowest, rel=1e-9)
    limit = int(share * max(problem.peak(choice) for choice in every_choice(problem)))
    fitting = [choice for choice in every_choice(problem) if problem.peak(choice) <= limit]
    found = fastest_within(problem, limit)
    assert (found is None) == (not fitting)
    if found is not None:
        assert problem.peak(found) <= limit
        assert problem.time(found) == pytest.approx(min(problem.time(choice) for choice in fitting), abs=1e-6)


def test_alternatives_that_are_not_monotone_are_all_considered():
    """The middle one has the highest peak; a search that goes on from the last fitting one would miss the third."""
    moments = (MomentBytes((), 0, (90, 100, 50)), MomentBytes(((0, (40, 20, 10)),), None, (0,)))
    problem = PolicyProblem(((1.0, 2.0, 3.0),), moments)
    assert fastest_within(problem, 95) == (0,)
    assert fastest_within(problem, 89) == (2,)
    assert fastest_within(problem, 49) is None
    assert least_peak(problem) == (2,)


def test_only_as_many_blocks_recompute_as_must():
    """80 equal blocks: the exact optimum is known, and is found at once."""
    num = 80
    saved = tuple((block, (100, 50, 10)) for block in range(num))
    moments = [MomentBytes(saved[:block], block, (30, 45, 40)) for block in range(num)]
    problem = PolicyProblem(((1.0, 1.2, 1.3),) * num, tuple(moments))
    choice = fastest_within(problem, 79 * 100 + 30)
    assert choice is not None and set(choice) == {0}
    choice = fastest_within(problem, 79 * 100 + 30 - 50 * 9)
    assert choice is not None and problem.peak(choice) <= 79 * 100 + 30 - 50 * 9
    assert problem.time(choice) == pytest.approx(num + 5 * 0.3)
