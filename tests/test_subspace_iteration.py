"""Settings of the subspace method: random columns besides the basis, several iterations in a row."""

import pytest
import torch

import galore_fx
from galore_fx.runtime.subspace.bases import leading_columns, orthonormalize, sketch_of
from tests.models import adamw, backward, batches, largest_error, llama, straight_and_resumed, train
from tests.references import PlainGaLore

pytestmark = pytest.mark.usefixtures("without_kernels")

PARTS = {"rank": 8, "oversampling": 5, "refresh_gap": 3, "stagger": False}


def test_a_refresh_sketches_the_random_columns_too():
    model, plain = galore_fx.compile(llama(1), optimizer=adamw(), **PARTS), llama(1)
    ids = batches(1)[0]
    backward(plain, ids)
    grads = {name: p.grad for name, p in plain.named_parameters()}
    records = list(model.galore_fx.optimizer.records)
    before = {r.name: (r.basis.clone(), r.source.columns.clone()) for r in records}
    train(model, [ids])
    for record in records:
        old, columns = before[record.name]
        assert columns.shape == (old.shape[0], 5) and 0.5 < columns.square().sum(0).mean() < 2
        sketch = sketch_of(grads[record.name], torch.cat([old, columns], 1), record.dim)
        expected = orthonormalize(leading_columns(sketch, 8))
        torch.testing.assert_close(record.basis @ record.basis.T, expected @ expected.T, atol=1e-3, rtol=0)
    assert len({float(columns[0, 0]) for _, columns in before.values()}) == len(records), "each has its own"


def test_galore2_equals_a_plain_loop_in_the_same_bases():
    model, plain = llama(1), llama(1)
    galore_fx.compile(model, recipe="galore2", rank=8, refresh_gap=3, optimizer=adamw())
    records = {record.name: record for record in model.galore_fx.optimizer.records}
    parameters = dict(plain.named_parameters())
    others = [p for name, p in parameters.items() if name not in records]
    reference = PlainGaLore([parameters[name] for name in records], others, rank=8, gap=None, scale=0.25, lr=1e-3)
    for batch in batches(10):
        for name, record in records.items():
            assert record.source.columns.shape[1] == 8
            reference.bases[parameters[name]] = record.basis.clone()
        train(model, [batch])
        backward(plain, batch)
        reference.step()
    assert largest_error(model, plain) < 1e-4
    assert model.galore_fx.stats()["num_refreshes"] == 7 * 5


@pytest.mark.parametrize("parts", [{}, {"update": "in-backward", "cross_head": "query-key", "project": "input"}])
def test_several_iterations_and_a_resumed_run_draws_the_same(parts):
    def make():
        return galore_fx.compile(llama(1), optimizer=adamw(), iterations=2, **PARTS, **parts)

    straight, _ = straight_and_resumed(make, batches(7), 4)
    assert straight.galore_fx.stats()["num_refreshes"] == 7 * 5  # updates 0, 1, 3, 4, 6


@pytest.mark.parametrize("update", ["deferred", "in-backward"])
def test_a_random_basis_is_drawn_anew_with_each_gap_and_the_same_in_a_resumed_run(update):
    def make():
        return galore_fx.compile(
            llama(1), optimizer=adamw(), basis="random", rank=8, refresh_gap=3, stagger=False, update=update
        )

    ids = batches(7)
    straight, _ = straight_and_resumed(make, ids, 4)
    assert straight.galore_fx.stats()["num_region_variants"] == 1, "a refresh needs no graph of its own"
    model, seen = make(), []
    record = next(iter(model.galore_fx.optimizer.records))
    for batch in ids:
        train(model, [batch])
        seen.append(record.basis.clone())
        torch.testing.assert_close(seen[-1].T @ seen[-1], torch.eye(8), atol=1e-5, rtol=0)
    changed = [not torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False)]
    assert changed == [False, False, True, False, False, True]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"oversampling": -1}, "oversampling=-1 must be an int of at least 0"),
        ({"oversampling": 4, "basis": "svd"}, "oversampling=4 is of basis='subspace-iteration'"),
        ({"oversampling": 4, "refresh": "lazy"}, "oversampling=4 changes what the overlap of a sketch means"),
        ({"basis": "random", "refresh": "lazy"}, "looks at no gradient, and refresh='lazy' decides on one"),
        ({"basis": "random", "oversampling": 2}, "basis='random' has none"),
        ({"iterations": 2, "refresh_limit": 1}, "which refresh_limit=1 may break up"),
        ({"iterations": 0}, "iterations=0 must be an int of at least 1"),
        ({"iterations": 4, "refresh_gap": 3}, "iterations=4 take as many updates"),
    ],
)
def test_what_makes_no_sense_is_refused(parts, message):
    with pytest.raises(galore_fx.SettingError, match=message):
        galore_fx.compile(llama(1), optimizer=adamw(), **parts)
