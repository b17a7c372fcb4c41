"""Renewing a basis when the gradient inside it has stopped moving: the criterion, a plain loop, a resumed run."""

import math

import pytest
import torch

import galore_fx
from galore_fx.runtime.subspace.refresh_criteria import Displacement
from galore_fx.runtime.subspace.refresh_queue import FixedSchedule, RefreshLimits, RefreshQueue
from tests.models import adamw, backward, batches, largest_error, llama, straight_and_resumed
from tests.references import PlainLotus

pytestmark = pytest.mark.usefixtures("without_kernels")

PARTS = {"recipe": "lotus", "rank": 8, "lotus_interval": 2, "lotus_threshold": 0.3}


def direction(angle):
    return torch.tensor([math.cos(angle), math.sin(angle)])


def test_a_direction_that_stays_is_renewed_and_one_that_turns_is_not():
    criterion = Displacement(threshold=0.1, interval=4)
    first = {0: torch.zeros(2), 1: torch.zeros(2)}
    for update in range(8):
        criterion.note(0, 3.0 * direction(0.01 * update), first[0])
        criterion.note(1, 0.5 * direction(0.3 * update), first[1])
        assert criterion.used_up == ({0} if update >= 3 else set())
    torch.testing.assert_close(first[0], direction(0.0))
    assert criterion.take() == {0} and criterion.take() == set()
    criterion.restart(0)
    criterion.note(0, direction(1.0), first[0])
    torch.testing.assert_close(first[0], direction(1.0))
    assert criterion.ages == {0: 1, 1: 8}


def test_no_basis_outlives_two_by_the_threshold():
    criterion, first = Displacement(threshold=0.02, interval=7), torch.zeros(2)
    for update in range(1, 200):
        criterion.note(0, direction(3.1415 * (update > 1)), first)  # as far as it can be
        if criterion.take():
            break
    assert update == 105  # the first multiple of 7 after 2 / 0.02 = 100


def test_after_the_first_updates_only_the_criterion_makes_a_weight_due():
    queue = RefreshQueue(
        {0: 0, 1: 0}, FixedSchedule(3, 1, stagger=False, num_initial=2), RefreshLimits(), Displacement(0.1, 4)
    )
    turns = []
    for update in range(12):
        queue.admit(update)
        turns.append(queue.turn())
        for key in turns[-1]:
            queue.finish(key)
        if update == 6:
            queue.criterion.used_up.add(1)
    assert turns == [{0, 1}, {0, 1}] + 5 * [set()] + [{1}] + 4 * [set()]


def test_twelve_steps_equal_a_plain_loop():
    model, plain, ids = llama(2), llama(2), batches(12)
    galore_fx.compile(model, optimizer=adamw(), basis="svd", scale=0.5, **PARTS)
    names = {record.name for record in model.galore_fx.optimizer.records}
    parameters = dict(plain.named_parameters())
    reference = PlainLotus(
        [parameters[name] for name in names], [p for name, p in parameters.items() if name not in names],
        rank=8, interval=2, threshold=0.3, scale=0.5, lr=1e-3,
    )  # fmt: skip
    for batch in ids:
        backward(model, batch)
        model.galore_fx.optimizer.step()
        backward(plain, batch)
        reference.step()
    assert largest_error(model, plain) < 1e-4
    refreshes = model.galore_fx.stats()["num_refreshes"]
    assert refreshes == reference.num_refreshes and 14 < refreshes < 14 * 6


@pytest.mark.parametrize("update", ["deferred", "in-backward"])
def test_a_resumed_run_decides_the_same(update):
    def make():
        return galore_fx.compile(llama(1), optimizer=adamw(), update=update, **PARTS)

    ids = batches(11)
    straight, resumed = straight_and_resumed(make, ids, 5)
    assert resumed.galore_fx.stats()["num_refreshes"] == straight.galore_fx.stats()["num_refreshes"] > 2 * 7


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"lotus_threshold": 0.0}, "lotus_threshold=0.0 must be a finite number above 0"),
        ({"lotus_interval": 0}, "lotus_interval=0 must be an int of at least 1"),
        ({"iterations": 2}, "iterations=2 are updates in a row that follow from a fixed gap"),
    ],
)
def test_what_makes_no_sense_is_refused(parts, message):
    with pytest.raises(galore_fx.SettingError, match=message):
        galore_fx.compile(llama(1), recipe="lotus", optimizer=adamw(), **parts)
