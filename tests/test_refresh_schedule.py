"""When bases are renewed."""

import pytest

from galore_fx.runtime.refresh_schedule import FixedSchedule


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
