"""When bases are renewed."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import galore_fx
from galore_fx.assembly.refresh_cost import refresh_costs
from galore_fx.passes.model_graph.find_regions import find_regions
from galore_fx.planner.verify_peak import counted_peak
from galore_fx.runtime.subspace.refresh_queue import FixedSchedule, RefreshCost, RefreshLimits, RefreshQueue
from tests.calls import Blocks
from tests.models import adamw, batches, llama


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


@settings(suppress_health_check=[HealthCheck.too_slow])  # drawing may wait
@given(
    num_layers=st.integers(1, 9),
    limits=st.builds(
        RefreshLimits,
        num_layers=st.none() | st.integers(1, 4),
        num_bytes=st.none() | st.integers(5, 30),
        time_s=st.none() | st.integers(5, 30),
    ),
    sizes=st.lists(st.integers(0, 9), min_size=9, max_size=9),
    times=st.lists(st.integers(0, 9), min_size=9, max_size=9),
    gap=st.integers(1, 12),
    stagger=st.booleans(),
    failing=st.sets(st.integers(0, 8)),
)
def test_a_queue_keeps_its_limits_starves_none_and_repeats_itself(
    num_layers, limits, sizes, times, gap, stagger, failing
):
    costs = {layer: RefreshCost(sizes[layer], times[layer]) for layer in range(num_layers)}
    layers = {key: key // 2 for key in range(2 * num_layers)}  # two weights in each
    schedule = FixedSchedule(gap, num_layers, stagger, 1)

    def run():
        queue, turns = RefreshQueue(layers, schedule, limits, costs=costs), []
        for update in range(40):
            queue.admit(update)
            turns.append(queue.turn())
            for key in turns[-1]:
                queue.fail(key, update) if layers[key] in failing else queue.finish(key)
        return turns

    turns = run()
    assert turns == run()
    served = [{layers[key] for key in turn} for turn in turns]
    for turn in served:
        whole = sum((costs[layer] for layer in turn), RefreshCost())
        assert len(turn) <= 1 or limits.allow(len(turn), whole)
    # Each update serves the head of the queue, so that none waits longer than the others take in turn.
    once = limits.num_turns(costs.values())
    assert once <= num_layers
    for layer in range(num_layers):
        at = [update for update, turn in enumerate(served) if layer in turn]
        assert at and at[0] < once
        assert all(b - a <= 2 * max(gap, num_layers) for a, b in zip(at, at[1:], strict=False))
        assert all({2 * layer, 2 * layer + 1} <= turns[update] for update in at), "a layer refreshes as a whole"


def test_as_many_layers_as_the_costs_allow():
    costs = [RefreshCost(size, 1.0) for size in (5, 2, 3, 9)]
    assert RefreshLimits().most_layers(costs) is None
    assert RefreshLimits(num_bytes=19).most_layers(costs) is None
    assert RefreshLimits(num_bytes=10).most_layers(costs) == 3
    assert RefreshLimits(num_bytes=10, time_s=2.5).most_layers(costs) == 2
    assert RefreshLimits(num_layers=1, num_bytes=10).most_layers(costs) == 1
    assert RefreshLimits(num_bytes=10).num_turns(costs) == 2, "5 + 2 + 3, then 9: none overtakes"


def test_a_refresh_that_exceeds_a_limit_alone_or_a_gap_too_short_is_refused():
    with pytest.raises(galore_fx.SettingError, match=r"refresh_limit_bytes=1000 is less than .* model.layers.0 alone"):
        galore_fx.plan(llama(2), recipe="galore", refresh_limit_bytes=1000)
    with pytest.raises(galore_fx.SettingError, match="the 4 blocks take 4 updates to renew all bases once"):
        galore_fx.plan(llama(4), recipe="galore", refresh_limit=1, refresh_gap=3)
    with pytest.raises(galore_fx.SettingError, match="refresh_limit_s=-1 must be a finite number above 0"):
        galore_fx.plan(llama(2), refresh_limit_s=-1)


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("recipe", ["galore", "auto"])
def test_a_block_without_a_gradient_holds_up_no_other(recipe):
    """The first one is not run, the last one is frozen later on; the one between them has its turns."""
    torch.manual_seed(0)
    parts = {"recipe": recipe, "refresh_limit": 1, "refresh_gap": 4, "stagger": False}
    model = galore_fx.compile(Blocks(count=3), rank=4, optimizer=adamw(), **parts)
    of_block = {
        name: [r for r in model.galore_fx.optimizer.records if r.name.startswith(f"blocks.{name}.")]
        for name in range(3)
    }

    def train(count):
        for _ in range(count):
            model.blocks[2](model.blocks[1](torch.randn(2, 24))).square().sum().backward()
            model.galore_fx.optimizer.step()

    first = [r.basis.clone() for r in of_block[2]]
    train(8)
    assert not any(torch.equal(r.basis, basis) for r, basis in zip(of_block[2], first, strict=True))
    model.blocks[2].requires_grad_(False)
    before = {name: [r.basis.clone() for r in records] for name, records in of_block.items()}
    train(8)
    for name, has_changed in ((0, False), (1, True), (2, False)):
        for record, basis in zip(of_block[name], before[name], strict=True):
            assert torch.equal(record.basis, basis) is not has_changed, record.name
    assert "blocks.2" not in [entry["block"] for entry in model.galore_fx.stats()["refresh_queue"]]


def test_bytes_limit_what_refreshes_and_no_step_exceeds_the_plan():
    ids = batches(1, 3, 32)[0]
    sample = {"input_ids": ids, "labels": ids}
    wanted = {"recipe": "galore", "optimizer": adamw(), "sample": sample, "refresh_gap": 10}
    loose = galore_fx.plan(llama(3), **wanted)
    costs = refresh_costs(find_regions(llama(3)), loose.parameters, loose.recipe)
    tight = galore_fx.plan(llama(3), refresh_limit_bytes=2 * costs[0].num_bytes, **wanted)
    assert tight.peak_bytes < loose.peak_bytes
    model = galore_fx.compile(llama(3), plan=tight, optimizer=adamw())
    queue = model.galore_fx.stats()["refresh_queue"]
    assert [entry["block"] for entry in queue] == [f"model.layers.{i}" for i in range(3)]
    assert queue[0] == {"block": "model.layers.0", "due_since": 0, **vars(costs[0])}
    assert counted_peak(model, sample) - tight.peak_bytes in (0, 28)
