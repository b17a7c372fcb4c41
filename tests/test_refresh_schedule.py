"""When bases are renewed."""

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from galore_fx.runtime.refresh_schedule import FixedSchedule, RefreshQueue


def _due(schedule, updates):
    return [[g for g in range(schedule.num_groups) if schedule.is_due(g, t)] for t in range(updates)]


def test_the_published_schedule_refreshes_all_in_the_same_update():
    due = _due(FixedSchedule(gap=5, num_groups=3, stagger=False, num_initial=1), 11)
    assert [t for t, groups in enumerate(due) if groups] == [0, 5, 10]
    assert due[5] == [0, 1, 2]


def test_staggered_groups_take_turns():
    due = _due(FixedSchedule(gap=6, num_groups=3, stagger=True, num_initial=2), 20)
    assert due[:2] == [[0, 1, 2], [0, 1, 2]]
    assert due[2:9] == [[1], [], [2], [], [0], [], [1]]
    assert max(len(groups) for groups in due[2:]) == 1


@pytest.mark.parametrize(("gap", "groups"), [(1, 4), (3, 8), (7, 7), (200, 32)])
def test_every_group_refreshes_once_per_gap(gap, groups):
    schedule = FixedSchedule(gap=gap, num_groups=groups, stagger=True, num_initial=0)
    for group in range(groups):
        times = [t for t in range(3 * gap) if schedule.is_due(group, t)]
        assert len(times) == 3
        assert {b - a for a, b in zip(times, times[1:], strict=False)} == {gap}


def test_a_refresh_of_several_iterations_takes_so_many_updates_in_a_row():
    due = _due(FixedSchedule(gap=5, num_groups=2, stagger=True, num_initial=2, num_iterations=2), 15)
    assert [t for t, groups in enumerate(due) if 0 in groups] == [0, 1, 5, 6, 10, 11]
    assert [t for t, groups in enumerate(due) if 1 in groups] == [0, 1, 2, 3, 7, 8, 12, 13]


@settings(suppress_health_check=[HealthCheck.too_slow])  # drawing waits where the machine is shared
@given(
    num_layers=st.integers(1, 9),
    limit=st.integers(1, 4),
    gap=st.integers(1, 12),
    stagger=st.booleans(),
    failing=st.sets(st.integers(0, 8)),
)
def test_a_queue_keeps_its_limit_starves_none_and_repeats_itself(num_layers, limit, gap, stagger, failing):
    layers = {key: key // 2 for key in range(2 * num_layers)}  # two weights in each
    schedule = FixedSchedule(gap, num_layers, stagger, 1)

    def run():
        queue, turns = RefreshQueue(layers, schedule, limit), []
        for update in range(40):
            queue.admit(update)
            turns.append(queue.turn())
            for key in turns[-1]:
                queue.fail(key, update) if layers[key] in failing else queue.finish(key)
        return turns

    turns = run()
    assert turns == run()
    served = [{layers[key] for key in turn} for turn in turns]
    assert max(map(len, served)) <= limit
    longest = max(gap, -(-num_layers // limit))
    for layer in range(num_layers):
        times = [update for update, turn in enumerate(served) if layer in turn]
        assert times and times[0] < -(-num_layers // limit)
        assert all(b - a <= 2 * longest for a, b in zip(times, times[1:], strict=False))
        assert all({2 * layer, 2 * layer + 1} <= turns[update] for update in times), "a layer refreshes as a whole"
