"""Fira's residual: a plain loop, what it holds, and what it refuses."""

import pytest
import torch

import galore_fx
from galore_fx.planner.verify_peak import counted_peak, kept_bytes
from galore_fx.runtime.remainder.scaled import complement_of
from galore_fx.runtime.subspace.bases import random_basis
from galore_fx.runtime.subspace.factored_gradient import GradientProduct
from galore_fx.runtime.subspace.projected_parameter import ProjectedParameter
from galore_fx.runtime.subspace.projection import ProjectedDim, add_back_projection_
from tests.models import adamw, backward, batches, largest_error, llama, straight_and_resumed, train
from tests.references import PlainFira

pytestmark = pytest.mark.usefixtures("without_kernels")

PARTS = {"recipe": "fira", "rank": 8, "refresh_gap": 4}


def pair(lr, **parts):
    model, plain = llama(2), llama(2)
    galore_fx.compile(model, optimizer=adamw(lr=lr), **{**PARTS, **parts})
    names = {record.name for record in model.galore_fx.optimizer.records}
    parameters = dict(plain.named_parameters())
    reference = PlainFira(
        [parameters[name] for name in names], [p for name, p in parameters.items() if name not in names],
        rank=8, gap=4, scale=0.25, lr=lr,
    )  # fmt: skip
    return model, plain, reference


def test_ten_steps_equal_a_plain_loop_with_its_limiter():
    model, plain, reference = pair(1e-3)
    for batch in batches(10):
        backward(model, batch)
        model.galore_fx.optimizer.step()
        backward(plain, batch)
        reference.step()
    assert largest_error(model, plain) < 1e-4
    assert 0 < reference.num_limited < 140, "the limiter has acted, and not always"


def test_a_learning_rate_of_zero_changes_nothing():
    model, plain, _ = pair(0.0)
    backward(model, batches(1)[0])
    model.galore_fx.optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


def test_a_step_that_is_not_finite_is_skipped():
    model, plain, _ = pair(1e-3)
    (model(input_ids=(ids := batches(1)[0]), labels=ids).loss * torch.nan).backward()
    model.galore_fx.optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("formed", [True, False], ids=["formed", "in factors"])
@pytest.mark.parametrize("dim", list(ProjectedDim))
def test_a_row_without_a_gradient_stays_where_it_is_but_for_the_momentum(dim, formed):
    shape, rank = (6, 8), 6
    rows, cols = torch.randn(5, 6), torch.randn(5, 8)
    (rows if dim is ProjectedDim.COLS else cols)[:, 2] = 0.0
    basis = torch.linalg.qr(torch.randn(dim.basis_shape(shape, rank))).Q
    record = ProjectedParameter.create("w", torch.nn.Parameter(torch.randn(shape)), dim, rank, basis)
    record.complement_norm = torch.zeros(())
    product = GradientProduct(rows, cols)
    grad, energies = product.formed(), product.energies(dim)
    torch.testing.assert_close(energies, grad.square().sum(int(dim is ProjectedDim.COLS), keepdim=True))
    projected = record.project(grad)
    given = (product, energies) if not formed else (grad, None)
    taken = {}
    for maximize in (False, True):
        whole = given[0] if not formed else grad.clone()
        complement = complement_of(record, whole, given[1], projected, {"lr": 0.1, "maximize": maximize}, 0.25)
        update = torch.ones(dim.projected_shape(shape, rank))
        joined, weight = complement.join(update), torch.zeros(shape)
        add_back_projection_(weight, joined - update, basis, dim, 1.0)
        complement.take_from_(weight)
        taken[maximize] = weight
        record.complement_norm.zero_()
    assert torch.isfinite(taken[False]).all() and taken[False].any()
    without = (taken[False] if dim is ProjectedDim.COLS else taken[False].T)[2]
    torch.testing.assert_close(without, torch.zeros_like(without))
    torch.testing.assert_close(taken[True], -taken[False])


@pytest.mark.parametrize("recipe", ["fira", "galore+", "lotus"])
def test_float64_trains_as_float32_does(recipe):
    parts = {"recipe": recipe, "rank": 8, "optimizer": adamw()} | (
        {"residual_warm_up": 1} if recipe == "galore+" else {"lotus_interval": 1} if recipe == "lotus" else {}
    )
    models = [galore_fx.compile(llama(1).to(dtype), **parts) for dtype in (torch.float32, torch.float64)]
    for model in models:
        train(model, batches(3))
    assert largest_error(*models) < 1e-3


def test_a_random_basis_stays_the_one_that_was_drawn():
    model, _, _ = pair(1e-3, basis="random")
    record = next(iter(model.galore_fx.optimizer.records))
    backward(model, batches(1)[0])
    expected = random_basis(tuple(record.basis.shape), torch.Generator().manual_seed(record.source.key & 0xFFFFFFFF))
    model.galore_fx.optimizer.step()
    torch.testing.assert_close(record.basis, expected)
    assert model.galore_fx.stats()["num_refreshes"] == 14


def test_resume_is_bit_identical():
    straight_and_resumed(lambda: pair(1e-3)[0], batches(7), 3)


@pytest.mark.kernels
def test_the_peak_is_predicted_and_no_higher_than_without_a_residual():
    ids = batches(1, batch=1)[0]
    sample = {"input_ids": ids, "labels": ids}
    wanted = {"sample": sample, "optimizer": adamw(), "rank": 16, "basis": "subspace-iteration"}
    model = galore_fx.compile(llama(4, hidden=128, intermediate=256), recipe="fira", **wanted)
    plan = galore_fx.plan(llama(4, hidden=128, intermediate=256), recipe="fira", **wanted)
    # The update happens at the peak, and the first model of a process allocates its step's seven numbers there.
    assert counted_peak(model, sample) - plan.peak_bytes in (0, 28)
    assert kept_bytes(model, model.galore_fx.optimizer)["residuals"] == plan.prediction.kept["residuals"] == 28 * 4
    without = galore_fx.plan(llama(4, hidden=128, intermediate=256), update="in-backward", **wanted)
    assert plan.peak_bytes <= without.peak_bytes


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"update": "deferred"}, "update='deferred' would hold all of them at once"),
        ({"weight_bits": 8}, "adds to a plain weight"),
        ({"max_grad_norm": 1.0}, "max_grad_norm needs all gradients at once"),
    ],
)
def test_what_makes_no_sense_is_refused(parts, message):
    with pytest.raises(galore_fx.SettingError, match=message):
        galore_fx.compile(llama(1), recipe="fira", optimizer=adamw(), **parts)
