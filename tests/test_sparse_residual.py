"""Sparse residuals: entries learnt in a warm-up, their gradients without G, three variants against a plain loop."""

import copy
import functools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import galore_fx
from galore_fx.planner.verify_peak import counted_peak, kept_bytes
from galore_fx.runtime.remainder import sparse
from galore_fx.runtime.remainder.sparse import (
    SparseResidual,
    add_at_,
    back_projection_at,
    entries_of,
    gradient_at,
    set_at_,
)
from galore_fx.runtime.subspace.basis_heads import HeadBasis
from galore_fx.runtime.subspace.projection import ProjectedDim
from tests.models import adamw, backward, batches, largest_error, llama

pytestmark = pytest.mark.usefixtures("without_kernels")

# Entries of a block of 128 by 256: 38 of 128 columns, 77 of 256, in 128, 256 (gate, up) and 128 (down) rows.
SHAPES = 4 * [(128, 38)] + 2 * [(256, 38)] + [(128, 77)]
SPARSE = {"residual": "sparse", "residual_density": 0.1, "residual_warm_up": 3, "refresh_gap": 100}


def _columns(num_blocks, n, k):
    return torch.rand(num_blocks, n).argsort(dim=1)[:, :k].to(torch.int32)


def _rows(columns, num_rows):
    """The columns of each row, as a block is defined."""
    block = sparse.BLOCK_ROWS
    return torch.stack([columns[row // block] for row in range(num_rows)]).long()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 9), st.integers(1, 12), st.integers(2, 12), st.data(), st.integers(1, 5), st.integers(1, 90))
def test_entries_of_the_gradient_and_of_a_back_projection(t, m, n, data, block, part):
    k = data.draw(st.integers(1, n))
    r = data.draw(st.integers(1, min(m, n)))
    before = sparse.BLOCK_ROWS, sparse.PART_ELEMENTS
    sparse.BLOCK_ROWS, sparse.PART_ELEMENTS = block, part
    try:
        rows, cols, columns = torch.randn(t, m).double(), torch.randn(t, n).double(), _columns(-(-m // block), n, k)
        at = _rows(columns, m)
        torch.testing.assert_close(gradient_at(rows, cols, columns), (rows.T @ cols).gather(1, at))
        low, basis = torch.randn(m, r).double(), torch.randn(n, r).double()
        expected = (low @ basis.T).gather(1, at)
        torch.testing.assert_close(back_projection_at(low, basis, ProjectedDim.COLS, columns), expected)
        torch.testing.assert_close(back_projection_at(basis.T, low, ProjectedDim.ROWS, columns), expected)
        weight, values = torch.randn(m, n).double(), torch.randn(m, k).double()
        changed = weight.clone()
        add_at_(changed, columns, values)
        torch.testing.assert_close((changed - weight).gather(1, at), values)
        assert int((changed != weight).sum()) == m * k
        set_at_(changed, columns, values)
        assert torch.equal(entries_of(changed, columns), values)
    finally:
        sparse.BLOCK_ROWS, sparse.PART_ELEMENTS = before


def test_the_warm_up_finds_the_largest_errors_and_never_a_column_twice():
    m, n, warm_up = 12 * 64 - 5, 60, 60
    residual = SparseResidual.create(torch.zeros(m, n), 0.1, variant="rectified", warm_up=warm_up)
    large = _columns(12, n, 3)  # half of the slots, which the contest is about
    mean = torch.full((m, n), 0.1).scatter(1, _rows(large, m), 1.0)
    for update in range(warm_up):
        noisy = mean * torch.empty(m, n).uniform_(0.5, 1.5) * torch.randn(m, n).sign()
        residual.learn(entries_of(noisy, residual.columns), n, update)
        assert all(len(set(row)) == 6 for row in residual.columns.tolist())
        assert int(residual.columns.min()) >= 0 and int(residual.columns.max()) < n
    residual.set_learning(warm_up)
    found = sum(len(set(a) & set(b)) for a, b in zip(residual.columns.tolist(), large.tolist(), strict=True))
    assert found == large.numel()
    assert residual.scores is None


@pytest.mark.parametrize(
    ("num_columns", "density"), [(n, 0.02) for n in (96, 128, 256, 768, 1000, 4096)] + [(60, 0.01), (100, 0.25)]
)
def test_the_warm_up_measures_every_column(num_columns, density):
    """Also where so few entries are wanted that one slot would do; at 2 % the recipe's own warm-up is enough."""
    wanted = galore_fx.RECIPES["galore+"].residual_warm_up if density == 0.02 else math.ceil(2.4 / density)
    residual = SparseResidual.create(torch.zeros(64, num_columns), density, variant="scaled", warm_up=wanted)
    num_slots = residual.columns.shape[1]
    seen = set()
    for update in range(residual.warm_up):
        seen.update(residual.columns.flatten().tolist())
        residual.scores = torch.zeros_like(residual.columns, dtype=torch.float32)
        residual.learn(torch.rand(64, num_slots), num_columns, update)
    assert len(seen) == num_columns


class PlainResidual:
    """GaLore with AdamW's arithmetic and a residual, from full gradients; bases and entries are given."""

    def __init__(self, variant, scale, lr=1e-3):
        self.variant, self.scale, self.lr = variant, scale, lr
        self.moments, self.norms = {}, {}

    def limited(self, name, scaled):
        norm, before = scaled.norm(), self.norms.get(name)
        if before is not None and norm > 1.01 * before:
            scaled = scaled * 1.01 * before / norm
        self.norms[name] = scaled.norm()
        return scaled

    def adam(self, key, grad):
        first, second, step = self.moments.get(key, (torch.zeros_like(grad), torch.zeros_like(grad), 0))
        first, second, step = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2, step + 1
        self.moments[key] = (first, second, step)
        return self.lr * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)

    @torch.no_grad()
    def step(self, name, weight, basis, dim, columns):
        grad = weight.grad
        right = dim is ProjectedDim.COLS
        low = grad @ basis if right else basis.T @ grad
        inside = low @ basis.T if right else basis @ low
        update = self.adam(name, low)
        change = self.scale * (update @ basis.T if right else basis @ update)
        if columns is not None:
            at = _rows(columns, len(grad))
            of = grad if self.variant == "rectified" else grad - inside
            if self.variant == "scaled":
                phi = update.norm(dim=int(right), keepdim=True) / (self.lr * low.norm(dim=int(right), keepdim=True))
                weight -= change.scatter_add(1, at, self.lr * self.limited(name, (phi * of).gather(1, at)))
                return
            extra = self.scale * self.adam(name + "/entries", of.gather(1, at))
            change = change.scatter(1, at, extra) if self.variant == "rectified" else change.scatter_add(1, at, extra)
        weight -= change


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("variant", "decay"), [("rectified", 0.0), ("additive", 0.0), ("scaled", 0.0), ("rectified", 0.1)]
)
def test_ten_steps_equal_a_plain_loop(variant, decay):
    """With a decay the optimizer is Adam, which adds it to the gradient: in the subspace, and at the entries."""
    optimizer = functools.partial(torch.optim.Adam, lr=1e-3, weight_decay=decay) if decay else adamw()
    model = galore_fx.compile(llama(1), rank=8, optimizer=optimizer, residual_variant=variant, **SPARSE)
    plain, reference = llama(1), PlainResidual(variant, 0.25)
    records = {record.name: record for record in model.galore_fx.optimizer.records}
    others = {name: p for name, p in plain.named_parameters() if name not in records}
    for number, ids in enumerate(batches(10)):
        bases = {name: record.basis.clone() for name, record in records.items()}
        backward(plain, ids)
        backward(model, ids)
        assert all(record.residual.is_learning == (number < 3) for record in records.values())
        model.galore_fx.optimizer.step()
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.grad += decay * parameter
        stats = model.galore_fx.stats()
        assert stats["residual_is_learning"] == (number < 2) and stats["num_residual_entries"] > 0
        for name, record in records.items():
            columns = record.residual.columns if number >= 3 else None
            reference.step(name, plain.get_parameter(name), bases[name], record.dim, columns)
        with torch.no_grad():
            for name, parameter in others.items():
                parameter -= reference.adam(name, parameter.grad)
        plain.zero_grad()
    assert largest_error(model, plain) < 1e-5


def _train(model, ids, parts=1):
    for batch in ids:
        for part in batch.chunk(parts):
            backward(model, part, 1 / parts)
        model.galore_fx.optimizer.step()


@pytest.mark.parametrize("variant", ["rectified", "scaled"])
def test_in_the_backward_and_in_micro_batches_it_is_the_same(variant):
    """With an SVD in the fifth window too, where the whole gradient arrives."""
    ids = batches(6)
    made = []
    given = SPARSE | {"refresh_gap": 4, "residual_variant": variant}
    for update, parts in (("deferred", 1), ("in-backward", 1), ("deferred", 2)):
        model = galore_fx.compile(llama(1), recipe="galore", rank=8, optimizer=adamw(), update=update, **given)
        _train(model, ids, parts)
        made.append(model)
    assert all(largest_error(made[0], other) < 2e-5 for other in made[1:])


@pytest.mark.parametrize(("stop", "variant"), [(2, "rectified"), (5, "rectified"), (5, "scaled")])
def test_resume_is_bit_identical_while_entries_are_learnt_and_after(stop, variant):
    def make():
        return galore_fx.compile(llama(1), rank=8, optimizer=adamw(), residual_variant=variant, **SPARSE)

    ids = batches(8)
    straight, stopped, resumed = make(), make(), make()
    _train(straight, ids)
    _train(stopped, ids[:stop])
    saved = copy.deepcopy(stopped.galore_fx.optimizer.state_dict())
    _train(resumed, ids[:4])  # a state from before its own, or from behind
    resumed.load_state_dict(stopped.state_dict())
    resumed.galore_fx.optimizer.load_state_dict(saved)
    _train(resumed, ids[stop:])
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_a_state_that_does_not_fit_changes_nothing():
    """Though one from inside the warm-up takes away what the residual keeps after it."""
    ids = batches(5)
    other = galore_fx.compile(llama(1), rank=4, optimizer=adamw(), **SPARSE)
    _train(other, ids[:1])
    for variant in ("scaled", "rectified"):
        model = galore_fx.compile(llama(1), rank=8, optimizer=adamw(), residual_variant=variant, **SPARSE)
        _train(model, ids)
        before = copy.deepcopy(model.galore_fx.optimizer.state_dict())
        with pytest.raises(galore_fx.OptimizerError):
            model.galore_fx.optimizer.load_state_dict(other.galore_fx.optimizer.state_dict())
        after = model.galore_fx.optimizer.state_dict()
        for number, state in before["state"].items():
            assert state.keys() == after["state"][number].keys()
            assert all(torch.equal(value, after["state"][number][name]) for name, value in state.items())
        assert not any(record.residual.is_learning for record in model.galore_fx.optimizer.records)


def test_an_uncompiled_block_and_the_backend_train_the_same():
    """Without cross-head bases: the sign and order of an eigenvector are a matter of the last bit."""
    parts = {"rank": 8, "residual": "sparse", "residual_density": 0.1, "residual_warm_up": 2, "refresh_gap": 3}
    parts["cross_head"] = None
    ids = batches(5)
    straight = galore_fx.compile(llama(1), optimizer=adamw(), recipe="galore+", stagger=False, **parts)
    whole = torch.compile(llama(1), backend="galore_fx", options={"recipe": "galore+", **parts})
    optimizer = galore_fx.optimizer(whole, adamw())
    for batch in ids:
        backward(whole, batch)
        optimizer.step()
    _train(straight, ids)
    assert largest_error(whole, straight) < 1e-4

    broken = llama(1)
    original = broken.model.layers[0].mlp.forward

    def with_a_break(x):
        torch._dynamo.graph_break()
        return original(x)

    broken.model.layers[0].mlp.forward = with_a_break
    galore_fx.compile(broken, optimizer=adamw(), recipe="galore+", stagger=False, **parts)
    with pytest.warns(UserWarning, match="could not be captured"):
        _train(broken, ids)
    assert largest_error(broken, straight) < 1e-4


def test_clipping_scales_the_entries_with_the_rest():
    model = galore_fx.compile(llama(1), rank=8, optimizer=adamw(), **SPARSE)
    backward(model, batches(1)[0])
    record = next(iter(model.galore_fx.optimizer.records))
    before = record.residual.leaf.grad.clone()
    norm = model.galore_fx.optimizer.clip_grad_norm_(0.1)
    torch.testing.assert_close(record.residual.leaf.grad, before * 0.1 / norm, rtol=1e-4, atol=1e-9)


@pytest.mark.kernels
def test_bytes_are_those_of_the_plan_and_the_peak_of_galore_plus_is_predicted():
    """With states in 8 bits and cross-head bases; of the entries the columns are kept and a norm."""
    ids = batches(1)[0]
    sample = {"input_ids": ids, "labels": ids}
    parts = {"recipe": "galore+", "rank": 16, "residual_density": 0.3, "residual_warm_up": 1, "state_bits": 8}
    plan = galore_fx.plan(llama(1, hidden=128, intermediate=256), sample=sample, optimizer=adamw(), **parts)
    model = galore_fx.compile(llama(1, hidden=128, intermediate=256), optimizer=adamw(), **parts)
    assert counted_peak(model, sample) == plan.peak_bytes
    assert sum(isinstance(record.source, HeadBasis) for record in model.galore_fx.optimizer.records) == 2
    kept = kept_bytes(model, model.galore_fx.optimizer)
    assert kept["residuals"] == plan.prediction.kept["residuals"] == sum(p.bytes["residuals"] for p in plan.parameters)
    assert kept["residuals"] == sum(m // 64 * k * 4 for m, k in SHAPES) + 7 * 4


def test_rectified_entries_have_states_in_8_bits_and_a_count():
    parts = {"residual_density": 0.3, "residual_warm_up": 1, "residual_variant": "rectified", "state_bits": 8}
    model = galore_fx.compile(llama(1, hidden=128, intermediate=256), recipe="galore+", optimizer=adamw(), **parts)
    _train(model, batches(1))
    kept = kept_bytes(model, model.galore_fx.optimizer)["residuals"]
    # Two moments in blocks of 256 codes with a scale, the number of each block's columns, the count of steps.
    states = sum(2 * -(-m * k // 256) * 260 for m, k in SHAPES)
    assert kept == states + sum(m // 64 * k * 4 for m, k in SHAPES) + 7 * 4
    assert kept == sum(p.bytes["residuals"] for p in model.galore_fx.plan.parameters)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"residual_density": 0.0}, "residual_density=0.0 must be a share"),
        ({"residual_warm_up": 0}, "residual_warm_up=0 must be an int of at least 1"),
        ({"weight_bits": 8}, "which weight_bits=8 keeps in groups"),
        ({"recipe": "full"}, "recipe 'full' projects none"),
        ({"residual_variant": "both"}, "'both' is not one of rectified, additive, scaled"),
        ({"residual": "all"}, "'all' is not one of drop, sparse, scaled"),
    ],
)
def test_what_makes_no_sense_is_refused(parts, message):
    with pytest.raises(galore_fx.SettingError, match=message):
        galore_fx.compile(llama(1), optimizer=adamw(), **{"residual": "sparse", **parts})
