"""Lowering of an optimizer step: labels, the algebra of the weight, live numbers, branches."""

import operator

import pytest
import torch
from torch import fx

from galore_fx.errors import OptimizerError
from galore_fx.passes.optimizer_graph.lower_to_subspace import LoweredStep, lower_to_subspace
from galore_fx.passes.optimizer_graph.merge_branches import merge_branches, numbers_of
from galore_fx.passes.optimizer_graph.trace_step import (
    GroupSettings,
    StateLayout,
    TracedStep,
    state_layout,
    trace_step,
)
from galore_fx.passes.optimizer_graph.update_compiler import UpdateCompiler
from galore_fx.runtime.subspace.bases import random_basis
from galore_fx.runtime.subspace.projected_parameter import ProjectedParameter
from galore_fx.runtime.subspace.projection import ProjectedDim

pytestmark = pytest.mark.usefixtures("without_kernels")


def _trace(optimizer_class, *, first=False, **settings):
    group = optimizer_class([torch.nn.Parameter(torch.ones(2, 2))], **settings).param_groups[0]
    layout = state_layout(optimizer_class, group)
    scalars = GroupSettings.read(group).floats | {f"state.{k}": v + 3.0 for k, v in layout.scalars.items()}
    return trace_step(optimizer_class, group, layout, scalars, first=first), scalars


def test_adamw_keeps_two_tensors_and_its_step():
    group = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2, 2))]).param_groups[0]
    layout = state_layout(torch.optim.AdamW, group)
    assert layout == StateLayout({"exp_avg": 0.0, "exp_avg_sq": 0.0}, {"step": 0.0})


def test_every_float_of_the_group_is_live():
    traced, scalars = _trace(torch.optim.AdamW)
    assert set(scalars) == {"lr", "betas.0", "betas.1", "eps", "weight_decay", "state.step"}
    lowered = lower_to_subspace(traced, projected=True)
    base = {"lr": 0.1, "betas.0": 0.9, "betas.1": 0.99, "eps": 1e-3, "weight_decay": 0.5, "state.step": 4.0}
    outputs = [lowered.prologue(*base.values(), 0.25)]
    for name in base:
        outputs.append(lowered.prologue(*{**base, name: base[name] * 0.5}.values(), 0.25))
    assert all(changed != outputs[0] for changed in outputs[1:])
    decay, new_step = outputs[0][lowered.num_slots :]
    assert decay == pytest.approx(1 - 0.1 * 0.5)
    assert new_step == 5.0


def test_a_branch_on_a_number_keys_the_variant():
    traced, scalars = _trace(torch.optim.AdamW, weight_decay=0.1)
    values = dict(scalars)
    assert traced.holds_for(tuple(values.values()))
    assert traced.holds_for(tuple({**values, "weight_decay": 0.7}.values()))
    assert not traced.holds_for(tuple({**values, "weight_decay": 0.0}.values()))


def test_decoupled_decay_leaves_the_body_and_l2_decay_needs_the_projected_weight():
    decoupled = lower_to_subspace(_trace(torch.optim.AdamW, weight_decay=0.1)[0], projected=True)
    coupled = lower_to_subspace(_trace(torch.optim.Adam, weight_decay=0.1)[0], projected=True)
    assert not decoupled.needs_weight and coupled.needs_weight


def _handmade(make_new_weight):
    """A step with one state: s' = s + g; w' = make_new_weight(graph, w, g, lr)."""
    graph = fx.Graph()
    inputs = {}
    for name in ("weight", "grad", "s", "lr"):
        inputs[name] = graph.placeholder(name)
        inputs[name].meta["galore_fx"] = {"input": name}
    state = graph.call_function(torch.ops.aten.add.Tensor, (inputs["s"], inputs["grad"]))
    new = make_new_weight(graph, inputs["weight"], inputs["grad"], inputs["lr"])
    graph.output([new, state])
    return TracedStep(fx.GraphModule({}, graph), ("s",), ("s",), ("lr",), (), False, (), lambda values: True)


def test_the_weight_is_kept_as_factor_and_low_rank_update():
    """w' = 3 (w - lr g) - w = 2 w - 3 lr g, over two edges into the weight and a difference of two FULL values."""

    def step(graph, w, g, lr):
        scaled = graph.call_function(torch.ops.aten.mul.Tensor, (g, lr))
        inner = graph.call_function(torch.ops.aten.sub.Tensor, (w, scaled))
        tripled = graph.call_function(torch.ops.aten.mul.Tensor, (inner, 3.0))
        return graph.call_function(torch.ops.aten.sub.Tensor, (tripled, w))

    lowered = lower_to_subspace(_handmade(step), projected=True)
    *numbers, factor = lowered.prologue(0.5, 0.25)
    assert factor == 2.0
    grad, state = torch.randn(7), torch.zeros(7)
    update, new_state = lowered.body(grad, state, torch.tensor(numbers))
    torch.testing.assert_close(update, -3 * 0.5 * 0.25 * grad)
    torch.testing.assert_close(new_state, grad)


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (torch.ops.aten.sign.default, "reads the weight in a way that is not scaling or adding"),
        (torch.ops.aten.sum.default, "is not elementwise"),
    ],
)
def test_what_is_not_affine_in_the_weight_is_refused_by_name(operation, message):
    def step(graph, w, g, lr):
        return graph.call_function(torch.ops.aten.add.Tensor, (w, graph.call_function(operation, (w,))))

    with pytest.raises(OptimizerError, match=message) as raised:
        lower_to_subspace(_handmade(step), projected=True)
    assert str(operation) in str(raised.value)


@pytest.mark.parametrize("optimizer_class", [torch.optim.Adafactor, torch.optim.LBFGS])
def test_classes_that_cannot_be_lowered_are_refused_by_name(optimizer_class):
    optimizer = optimizer_class([torch.nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(OptimizerError, match=optimizer_class.__name__):
        UpdateCompiler(optimizer_class, optimizer.defaults).check(optimizer.param_groups[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", list(ProjectedDim))
def test_ten_updates_equal_a_loop_with_changing_numbers(dim, dtype):
    """R, states and back-projection against plain tensor code, the learning rate and betas changing each step."""
    weight = torch.nn.Parameter(torch.randn(12, 20).to(dtype), requires_grad=False)
    basis = random_basis(dim.basis_shape((12, 20), 3), torch.Generator().manual_seed(0)).to(dtype)
    record = ProjectedParameter.create("w", weight, dim, 3, basis)
    shape = record.leaf.shape
    state = {"exp_avg": torch.zeros(shape, dtype=dtype), "exp_avg_sq": torch.zeros(shape, dtype=dtype)}
    state["step"] = torch.tensor(0.0)
    optimizer = torch.optim.AdamW([weight])
    group = optimizer.param_groups[0]
    compiler = UpdateCompiler(torch.optim.AdamW, optimizer.defaults)
    w, p = weight.double(), basis.double()
    first = second = torch.zeros(shape, dtype=torch.float64)
    for t in range(1, 11):
        group.update(lr=0.01 * t, betas=(0.8 + 0.01 * t, 0.95), eps=1e-6 * t, weight_decay=0.1)
        grad = torch.randn(shape).to(dtype)
        compiler.update(weight, grad, state, group, compiler.read(group), record, 0.25, first=t == 1)
        g, (beta1, beta2) = grad.double(), group["betas"]
        first, second = beta1 * first + (1 - beta1) * g, beta2 * second + (1 - beta2) * g * g
        denominator = (second / (1 - beta2**t)).sqrt() + group["eps"]
        update = 0.25 * group["lr"] / (1 - beta1**t) * first / denominator
        w = w * (1 - group["lr"] * 0.1) - (p @ update if dim is ProjectedDim.ROWS else update @ p.T)
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    assert (weight.double() - w).norm() < tolerance * w.norm()
    assert state["step"] == 10
    assert compiler.num_graphs == 1


def test_scalar_operations_run_on_the_host():
    lowered = lower_to_subspace(_trace(torch.optim.AdamW)[0], projected=True)
    targets = {node.target for node in lowered.prologue.graph.nodes if node.op == "call_function"}
    assert targets <= {operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.neg}


def _branch(make, num_numbers):
    """A step s' = make(s, g, number...) whose update is its new state."""
    graph = fx.Graph()
    grad, state, numbers = (graph.placeholder(name) for name in ("grad", "s", "numbers"))
    values = [graph.call_function(operator.getitem, (numbers, i)) for i in range(num_numbers)]
    new = make(graph, state, grad, values)
    graph.output((new, new))
    return LoweredStep(fx.GraphModule({}, fx.Graph()), fx.GraphModule({}, graph), ("grad", "s"), (), num_numbers)


def test_merged_branches_are_chosen_by_number_and_write_in_place():
    scaled = _branch(lambda graph, s, g, n: graph.call_function(torch.mul, (g, n[0])), 1)
    divided = _branch(
        lambda graph, s, g, n: graph.call_function(torch.div, (graph.call_function(torch.mul, (s, n[0])), n[1])), 2
    )
    branches = [scaled, divided]
    body = merge_branches(branches, projected=True)
    grad = torch.tensor([1.0, 2.0])
    for taken, slots, expected in ((0, [3.0], [3.0, 6.0]), (1, [4.0, 2.0], [10.0, 14.0])):
        state = torch.tensor([5.0, 7.0])
        update = body(grad, state, torch.tensor(numbers_of(branches, taken, slots)))
        # The branch that is not taken divides zero by zero.
        assert update.tolist() == state.tolist() == expected
