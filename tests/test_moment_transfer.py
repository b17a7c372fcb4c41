"""States when a basis is exchanged: kept, rotated by LDAdam's formula, or reset."""

import functools

import pytest
import torch

import galore_fx
from galore_fx.runtime.formats.state_format import StateFormat
from galore_fx.runtime.subspace.moment_transfer import rotate_moments
from galore_fx.runtime.subspace.projection import ProjectedDim
from tests.models import adamw, backward, batches, llama

pytestmark = pytest.mark.usefixtures("without_kernels")


class Layout:
    """Of Adam."""

    def __init__(self, bits=None):
        self.initial = {"exp_avg": 0.0, "exp_avg_sq": 0.0}
        self.scalars = {"step": 0.0}
        self.format = StateFormat(bits, frozenset({"exp_avg_sq"}))


def _state(shape, layout, dtype=torch.float32):
    like = torch.empty(shape)
    return layout.format.make(layout.initial, like, dtype) | {"step": torch.tensor(7.0)}


GROUP = {"betas": (0.9, 0.999)}


@pytest.mark.parametrize("dim", list(ProjectedDim))
def test_adam_is_rotated_as_the_formula_says(dim):
    shape = (6, 4) if dim is ProjectedDim.COLS else (4, 6)
    state, layout = _state(shape, Layout()), Layout()
    first, second = torch.randn(shape), torch.rand(shape) + 1
    state["exp_avg"].copy_(first)
    state["exp_avg_sq"].copy_(second)
    rotation = torch.randn(4, 4) / 2
    rotate_moments(state, rotation, dim, torch.Size(shape), GROUP, layout)
    # Written out for one vector of coordinates at a time, in float64.
    first, second, c = first.double(), second.double(), rotation.double()
    if dim is ProjectedDim.ROWS:
        first, second = first.T, second.T
    bias1, bias2 = 1 - 0.9**7, 1 - 0.999**7
    for i in range(6):
        mean = first[i] / bias1
        expected = bias2 * ((c * c) @ (second[i] / bias2 - mean**2) + (c @ mean) ** 2).abs()
        got = [state[name] if dim is ProjectedDim.COLS else state[name].T for name in ("exp_avg", "exp_avg_sq")]
        torch.testing.assert_close(got[0][i].double(), c @ first[i], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got[1][i].double(), expected, rtol=1e-4, atol=1e-6)


def test_rotated_there_and_back_the_first_moment_is_the_same_and_8_bits_are_near():
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    for bits, tolerance in ((None, 1e-5), (8, 0.05)):
        layout, shape = Layout(bits), torch.Size((700, 8))
        state = _state(shape, layout)
        first = torch.randn(shape)
        if bits == 8:
            from galore_fx.runtime.subspace.moment_transfer import _read, _write

            _write(state, "exp_avg", first, layout)
            first = _read(state, "exp_avg", shape, layout)
        else:
            state["exp_avg"].copy_(first)
        for each in (rotation, rotation.T):
            rotate_moments(state, each, ProjectedDim.COLS, shape, GROUP, layout)
        from galore_fx.runtime.subspace.moment_transfer import _read

        assert float((_read(state, "exp_avg", shape, layout) - first).norm() / first.norm()) < tolerance


@pytest.mark.parametrize("centered", [False, True])
def test_rmsprops_momentum_is_no_mean_of_gradients(centered):
    """It adds up steps, some 1e5 times as long as gradients here; the mean of squares is mixed by itself."""
    torch.manual_seed(0)
    grad, average = 1e-5 * torch.randn(6, 4), 1e-5 * torch.randn(6, 4)
    layout = Layout()
    layout.initial = {"square_avg": 0.0, "momentum_buffer": 0.0} | ({"grad_avg": 0.0} if centered else {})
    square = grad.square() + average.square()
    state = {"square_avg": square.clone(), "momentum_buffer": grad / 1e-5, "step": torch.tensor(7.0)}
    state |= {"grad_avg": average.clone()} if centered else {}
    rotation = torch.linalg.qr(torch.randn(4, 4)).Q
    rotate_moments(state, rotation, ProjectedDim.COLS, torch.Size((6, 4)), {}, layout)
    expected = square @ rotation.square().T
    if centered:
        expected = (square - average**2) @ rotation.square().T + (average @ rotation.T) ** 2
    torch.testing.assert_close(state["square_avg"], expected.abs(), rtol=1e-3, atol=0)
    torch.testing.assert_close(state["momentum_buffer"], grad / 1e-5 @ rotation.T)


@pytest.mark.parametrize("how", ["keep", "rotate", "reset"])
def test_the_states_of_a_training(how):
    """With rank 64, the whole side, a rotated first moment means the same full-size moment in both bases."""
    model = galore_fx.compile(
        llama(1), recipe="galore", rank=64, refresh_gap=3, moments_on_refresh=how, optimizer=adamw()
    )
    record = next(r for r in model.galore_fx.optimizer.records if r.name.endswith("q_proj.weight"))
    state = model.galore_fx.optimizer.state[record.weight]
    ids = batches(4)
    for batch in ids[:3]:
        backward(model, batch)
        model.galore_fx.optimizer.step()
    assert float(state["step"]) == 3
    before, old = state["exp_avg"].clone(), record.basis.clone()
    beta = 0.9
    backward(model, ids[3])
    grad = record.weight.grad.clone()
    model.galore_fx.optimizer.step()
    assert not torch.allclose(old, record.basis)
    full = state["exp_avg"] @ record.basis.T
    expected = {
        "keep": beta * before @ record.basis.T + (1 - beta) * grad,
        "rotate": beta * before @ old.T + (1 - beta) * grad,
        "reset": (1 - beta) * grad,
    }[how]
    torch.testing.assert_close(full, expected, rtol=1e-3, atol=1e-6)
    assert float(state["step"]) == (1 if how == "reset" else 4)


def test_states_that_are_not_known_are_refused():
    with pytest.raises(galore_fx.OptimizerError, match="how to rotate exp_inf of Adamax; it knows exp_avg"):
        galore_fx.compile(
            llama(1), moments_on_refresh="rotate", optimizer=functools.partial(torch.optim.Adamax, lr=1e-3)
        )
    model = llama(1)
    head, others = [model.lm_head.weight], [p for p in model.parameters() if p is not model.lm_head.weight]
    groups = torch.optim.AdamW([{"params": head}, {"params": others, "amsgrad": True}], lr=1e-3)
    with pytest.raises(galore_fx.OptimizerError, match="how to rotate max_exp_avg_sq of AdamW"):
        galore_fx.compile(model, moments_on_refresh="rotate", optimizer=groups)
    groups = torch.optim.AdamW([{"params": head, "amsgrad": True}, {"params": others}], lr=1e-3)
    galore_fx.plan(model, moments_on_refresh="rotate", optimizer=groups)  # the head is not projected
