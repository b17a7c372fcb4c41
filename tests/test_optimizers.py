"""Each torch.optim class that can be lowered, against a plain loop: state in the subspace, update back-projected."""

import functools
import math

import pytest
import torch
from torch._dynamo.utils import counters

import galore_fx
from galore_fx.errors import OptimizerError
from galore_fx.passes.optimizer_graph.update_compiler import UpdateCompiler
from galore_fx.runtime.subspace.bases import random_basis
from galore_fx.runtime.subspace.projected_parameter import ProjectedParameter
from galore_fx.runtime.subspace.projection import ProjectedDim
from tests.models import backward, batches, largest_error, llama

pytestmark = pytest.mark.usefixtures("without_kernels")

# The references: (step t from 1, state s, gradient g, settings h) -> the update in the subspace, float64.


def plain_adam(t, s, g, h):
    beta1, beta2 = h["betas"]
    s["m"] = beta1 * s.get("m", 0) + (1 - beta1) * g
    s["v"] = beta2 * s.get("v", 0) + (1 - beta2) * g * g
    return h["lr"] / (1 - beta1**t) * s["m"] / ((s["v"] / (1 - beta2**t)).sqrt() + h["eps"])


def plain_sgd(t, s, g, h):
    s["b"] = g if t == 1 else h["momentum"] * s["b"] + (1 - h["dampening"]) * g
    return h["lr"] * (g + h["momentum"] * s["b"] if h["nesterov"] else s["b"])


def plain_rmsprop(t, s, g, h):
    s["v"] = h["alpha"] * s.get("v", 0) + (1 - h["alpha"]) * g * g
    s["b"] = h["momentum"] * s.get("b", 0) + g / (s["v"].sqrt() + h["eps"])
    return h["lr"] * s["b"]


def plain_nadam(t, s, g, h):
    beta1, beta2 = h["betas"]
    mu, mu_next = (beta1 * (1 - 0.5 * 0.96 ** (k * h["momentum_decay"])) for k in (t, t + 1))
    s["mu_product"] = s.get("mu_product", 1.0) * mu
    s["m"] = beta1 * s.get("m", 0) + (1 - beta1) * g
    s["v"] = beta2 * s.get("v", 0) + (1 - beta2) * g * g
    denominator = (s["v"] / (1 - beta2**t)).sqrt() + h["eps"]
    now = (1 - mu) / (1 - s["mu_product"]) * g
    ahead = mu_next / (1 - s["mu_product"] * mu_next) * s["m"]
    return h["lr"] * (now + ahead) / denominator


def plain_radam(t, s, g, h):
    beta1, beta2 = h["betas"]
    s["m"] = beta1 * s.get("m", 0) + (1 - beta1) * g
    s["v"] = beta2 * s.get("v", 0) + (1 - beta2) * g * g
    corrected = s["m"] / (1 - beta1**t)
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * t * beta2**t / (1 - beta2**t)
    if length <= 5:
        return h["lr"] * corrected
    rectified = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    return h["lr"] * corrected * math.sqrt(rectified * (1 - beta2**t)) / (s["v"].sqrt() + h["eps"])


def plain_adagrad(t, s, g, h):
    s["sum"] = s.get("sum", h["initial_accumulator_value"]) + g * g
    return h["lr"] / (1 + (t - 1) * h["lr_decay"]) * g / (s["sum"].sqrt() + h["eps"])


def plain_adamax(t, s, g, h):
    beta1, beta2 = h["betas"]
    s["m"] = beta1 * s.get("m", 0) + (1 - beta1) * g
    s["u"] = torch.maximum(beta2 * s.get("u", torch.zeros_like(g)), g.abs() + h["eps"])
    return h["lr"] / (1 - beta1**t) * s["m"] / s["u"]


def plain_adadelta(t, s, g, h):
    s["v"] = h["rho"] * s.get("v", 0) + (1 - h["rho"]) * g * g
    delta = (s.get("d", torch.zeros_like(g)) + h["eps"]).sqrt() / (s["v"] + h["eps"]).sqrt() * g
    s["d"] = h["rho"] * s.get("d", 0) + (1 - h["rho"]) * delta * delta
    return h["lr"] * delta


def changing_betas(t):
    return {"lr": 0.01 * t, "betas": (0.8 + 0.01 * t, 0.95 + 0.001 * t), "eps": 1e-6 * t, "weight_decay": 0.1 / t}


CASES = {
    "AdamW": (torch.optim.AdamW, {}, plain_adam, changing_betas),
    "Adam": (torch.optim.Adam, {}, plain_adam, changing_betas),
    "SGD": (
        torch.optim.SGD,
        {"momentum": 0.9, "dampening": 0.2},
        plain_sgd,
        lambda t: {"lr": 0.01 * t, "momentum": 0.9 - 0.02 * t, "dampening": 0.02 * t, "weight_decay": 0.1 / t},
    ),
    "SGD Nesterov": (
        torch.optim.SGD,
        {"momentum": 0.9, "nesterov": True},
        plain_sgd,
        lambda t: {"lr": 0.01 * t, "momentum": 0.9 - 0.02 * t, "weight_decay": 0.1 / t},
    ),
    "RMSprop": (
        torch.optim.RMSprop,
        {"momentum": 0.9},
        plain_rmsprop,
        lambda t: {"lr": 0.01 * t, "momentum": 0.9 - 0.02 * t, "alpha": 0.9 + 0.005 * t, "weight_decay": 0.1 / t},
    ),
    "NAdam": (torch.optim.NAdam, {}, plain_nadam, lambda t: changing_betas(t) | {"momentum_decay": 0.004 * t}),
    "RAdam": (torch.optim.RAdam, {}, plain_radam, changing_betas),
    "Adagrad": (
        torch.optim.Adagrad,
        {"initial_accumulator_value": 0.1},
        plain_adagrad,
        lambda t: {"lr": 0.01 * t, "lr_decay": 0.01 * t, "eps": 1e-6 * t, "weight_decay": 0.1 / t},
    ),
    "Adamax": (torch.optim.Adamax, {}, plain_adamax, changing_betas),
    "Adadelta": (
        torch.optim.Adadelta,
        {},
        plain_adadelta,
        lambda t: {"lr": 0.1 * t, "rho": 0.9 - 0.01 * t, "eps": 1e-6 * t, "weight_decay": 0.1 / t},
    ),
}
SHAPE, RANK, SCALE = (12, 20), 3, 0.25


def initial_state(compiler, settings, group, shape):
    layout = compiler.layout(settings, group)
    state = {name: torch.full(shape, value or 0.0) for name, value in layout.initial.items()}
    return state | {name: torch.tensor(value) for name, value in layout.scalars.items()}


@pytest.mark.parametrize("dim", list(ProjectedDim))
@pytest.mark.parametrize("name", CASES)
def test_ten_lowered_steps_equal_a_plain_loop_with_changing_settings(name, dim):
    optimizer_class, settings, plain, changing = CASES[name]
    weight = torch.nn.Parameter(torch.randn(SHAPE), requires_grad=False)
    basis = random_basis(dim.basis_shape(SHAPE, RANK), torch.Generator().manual_seed(0))
    record = ProjectedParameter.create("w", weight, dim, RANK, basis)
    optimizer = optimizer_class([weight], weight_decay=0.1, **settings)
    group = optimizer.param_groups[0]
    compiler = UpdateCompiler(optimizer_class, optimizer.defaults)
    state = initial_state(compiler, compiler.read(group), group, record.leaf.shape)
    w, p, s = weight.double(), basis.double(), {}
    counters["stats"].clear()
    for t in range(1, 11):
        group.update(changing(t))
        grad = torch.randn(record.leaf.shape)
        g = grad.double()
        compiler.update(weight, grad, state, group, compiler.read(group), record, SCALE, first=t == 1)
        if name == "AdamW":
            w_next = w * (1 - group["lr"] * group["weight_decay"])
        else:
            w_next = w
            g = g + group["weight_decay"] * (p.T @ w if dim is ProjectedDim.ROWS else w @ p)
        update = SCALE * plain(t, s, g, group)
        w = w_next - (p @ update if dim is ProjectedDim.ROWS else update @ p.T)
    assert (weight.double() - w).norm() < 1e-5 * w.norm()
    assert compiler.num_graphs == 1
    assert counters["stats"]["unique_graphs"] <= 1, "the body compiles once, or not again for the second side"


@pytest.mark.parametrize("name", CASES)
def test_full_rank_parameters_get_torchs_own_step(name):
    optimizer_class, settings, _, changing = CASES[name]
    weight = torch.nn.Parameter(torch.randn(7))
    theirs = torch.nn.Parameter(weight.detach().clone())
    optimizer = optimizer_class([theirs], weight_decay=0.1, foreach=False, **settings)
    group = optimizer.param_groups[0]
    compiler = UpdateCompiler(optimizer_class, optimizer.defaults)
    state = initial_state(compiler, compiler.read(group), group, weight.shape)
    for t in range(1, 11):
        group.update(changing(t))
        theirs.grad = torch.randn(7)
        with torch.no_grad():
            grad = theirs.grad.clone()
            compiler.update(weight, grad, state, group, compiler.read(group), None, SCALE, first=t == 1)
        optimizer.step()
    torch.testing.assert_close(weight, theirs, rtol=1e-5, atol=1e-6)
    assert compiler.num_graphs == 1


def test_a_decay_that_crosses_zero_compiles_once_more():
    weight = torch.nn.Parameter(torch.randn(7), requires_grad=False)
    optimizer = torch.optim.Adam([weight], weight_decay=0.1)
    group = optimizer.param_groups[0]
    compiler = UpdateCompiler(torch.optim.Adam, optimizer.defaults)
    state = initial_state(compiler, compiler.read(group), group, weight.shape)
    for t, decay in enumerate((0.1, 0.0, 0.2, 0.0, 0.05)):
        group["weight_decay"] = decay
        compiler.update(weight, torch.randn(7), state, group, compiler.read(group), None, 1.0, first=t == 0)
    assert compiler.num_graphs == 2


@pytest.mark.parametrize(
    "optimizer_class", [pytest.param(torch.optim.AdamW, marks=pytest.mark.kernels), torch.optim.SGD, torch.optim.RAdam]
)
def test_groups_and_one_cycle_change_settings_without_compiling(optimizer_class):
    """OneCycleLR cycles lr with beta1, or momentum; groups keep their own; the twin is torch's own, rank for rank."""
    model, reference = llama(1), llama(1)
    extra = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {}

    def make(each):
        matrices = [p for p in each.parameters() if p.ndim == 2]
        others = [p for p in each.parameters() if p.ndim != 2]
        groups = [{"params": matrices, "lr": 1e-3, "weight_decay": 0.01}, {"params": others, "lr": 1e-2}]
        return optimizer_class(groups, lr=1e-3, weight_decay=0.02, **extra)

    theirs = make(reference)
    # At full rank with a scale of one the lowered step is torch's own.
    galore_fx.compile(model, recipe="full", optimizer=make(model))
    ours = model.galore_fx.optimizer
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(o, max_lr=[1e-3, 1e-2], total_steps=12, base_momentum=0.8)
        for o in (ours, theirs)
    ]
    graphs = []
    for ids in batches(8):
        for each, optimizer in ((model, ours), (reference, theirs)):
            backward(each, ids)
            optimizer.step()
            optimizer.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
        graphs.append(model.galore_fx.stats()["num_update_graphs"])
    assert largest_error(model, reference) < 1e-4
    assert graphs == [graphs[0]] * 8


@pytest.mark.parametrize("name", ["Adafactor", "Muon", "LBFGS", "SparseAdam", "Rprop", "ASGD"])
def test_what_cannot_be_lowered_is_refused_by_name_with_what_can(name):
    optimizer_class = getattr(torch.optim, name)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False))
    with pytest.raises(
        OptimizerError, match=f"{name}.*AdamW, Adam, SGD, RMSprop, NAdam, RAdam, Adagrad, Adamax, Adadelta"
    ):
        galore_fx.compile(model, rank=2, optimizer=functools.partial(optimizer_class))
    assert not hasattr(model, "galore_fx")


def test_a_momentum_that_leaves_zero_gets_its_state():
    model, reference = llama(1), llama(1)
    galore_fx.compile(model, recipe="full", optimizer=torch.optim.SGD)
    ours, theirs = model.galore_fx.optimizer, torch.optim.SGD(reference.parameters())
    for momentum, ids in zip((0.0, 0.9, 0.8), batches(3), strict=True):
        for each, optimizer in ((model, ours), (reference, theirs)):
            optimizer.param_groups[0]["momentum"] = momentum
            backward(each, ids)
            optimizer.step()
            optimizer.zero_grad()
    assert largest_error(model, reference) < 1e-5
