"""Model-graph passes on hand-made graphs of a few nodes, the runner, and the analysis of regions."""

import operator

import pytest
import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from galore_fx.errors import CaptureError
from galore_fx.passes.model_graph.find_linears import WeightLayout, find_linears
from galore_fx.passes.model_graph.find_regions import find_regions
from galore_fx.passes.model_graph.inline_checkpoints import inline_checkpoints
from galore_fx.passes.model_graph.project_gradients import ProjectionTarget, project_gradients
from galore_fx.passes.model_graph.region_compiler import copy_graph
from galore_fx.passes.model_graph.slice_single_indices import slice_single_indices
from galore_fx.passes.pass_runner import run_passes
from galore_fx.runtime.layers.projected_linear import ProjectedLinear, Settings
from galore_fx.runtime.subspace.bases import random_basis, sketch
from galore_fx.runtime.subspace.basis_heads import HeadBasis
from galore_fx.runtime.subspace.basis_iteration import IteratedBasis
from galore_fx.runtime.subspace.projected_parameter import GradientForm, ProjectedParameter
from galore_fx.runtime.subspace.projection import ProjectedDim, project, projected_gradient
from tests.models import gpt2, llama


def two_linears(bias: bool = True) -> fx.GraphModule:
    """x (t, 6) -> linear W (5, 6) -> relu -> addmm V (5, 4)."""
    graph = fx.Graph()
    x, w, b, v = (graph.placeholder(name) for name in "xwbv")
    y = graph.call_function(torch._C._nn.linear, (x, w, b if bias else None))
    y = graph.call_function(torch.relu, (y,))
    graph.output((graph.call_function(torch.addmm, (b.graph.placeholder("c"), y, v)),))
    # The last placeholder was made after the calls; FX wants them first.
    first = next(node for node in graph.nodes if node.op == "call_function")
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        first.prepend(node)
    return fx.GraphModule({}, graph)


def values():
    torch.manual_seed(0)
    shapes = {"x": (7, 6), "w": (5, 6), "b": (5,), "v": (5, 4), "c": (4,)}
    return {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}


def test_linears_are_found_in_both_layouts():
    sites = find_linears(two_linears())
    assert [(site.weight.name, site.layout) for site in sites] == [
        ("w", WeightLayout.OUT_IN),
        ("v", WeightLayout.IN_OUT),
    ]
    assert (sites[0].input.name, sites[0].weight.name, sites[0].bias.name) == ("x", "w", "b")


def test_what_is_not_a_linear_of_an_input_is_not_found():
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    doubled = graph.call_function(torch.mul, (w, 2))
    y = graph.call_function(torch._C._nn.linear, (x, doubled))
    graph.output(graph.call_function(torch.addmm, (x, y, w), {"beta": 0}))
    assert find_linears(fx.GraphModule({}, graph)) == []


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dim", list(ProjectedDim))
@pytest.mark.parametrize("delivers", ["R", "R and a sketch", "R and some heads"])
def test_project_gradients_delivers_what_projecting_the_full_gradient_would(bias, dim, delivers):
    plain, given = two_linears(bias), values()
    plain(*given.values())[0].square().sum().backward()
    gm = two_linears(bias)
    targets, extra = [], []
    for index, name in ((1, "w"), (3, "v")):
        weight = nn.Parameter(given[name].detach())
        basis = random_basis(dim.basis_shape(tuple(weight.shape), 2), torch.Generator().manual_seed(1))
        source = IteratedBasis(weight, basis)
        if delivers == "R and some heads":
            source = HeadBasis(weight, ((0, 2), (1, 3)), 2, dim, 0)  # features of the dimension that is not projected
        record = ProjectedParameter.create(name, weight, dim, 2, basis, source)
        form = GradientForm.PROJECTED if delivers == "R" else GradientForm.REFRESHING
        inputs = tuple(record.graph_inputs(form))
        targets.append(ProjectionTarget(index, name, dim, inputs, source=source.name))
        extra.append(record)
    gm = project_gradients(gm, (), targets=targets)
    again = values()
    inputs = [value for record in extra for value in record.graph_inputs(form).values()]
    out = gm(*again.values(), *inputs)[0]
    torch.testing.assert_close(out, plain(*given.values())[0])
    out.square().sum().backward()
    for name in ("x", "b", "c"):
        if given[name].grad is not None:
            torch.testing.assert_close(again[name].grad, given[name].grad, rtol=1e-4, atol=1e-4)
    for record in extra:
        grad = given[record.name].grad
        assert again[record.name].grad is None
        torch.testing.assert_close(record.leaf.grad, project(grad, record.basis, dim), rtol=1e-4, atol=1e-4)
        if delivers == "R and a sketch":
            gram = grad @ grad.T if dim is ProjectedDim.ROWS else grad.T @ grad
            torch.testing.assert_close(record.source.leaf.grad, gram @ record.basis, rtol=1e-4, atol=1e-4)
        if delivers == "R and some heads":
            features = record.source.heads.features
            drawn = grad[features] if dim is ProjectedDim.COLS else grad[:, features]
            torch.testing.assert_close(record.source.leaf.grad, drawn, rtol=1e-4, atol=1e-4)


def test_project_gradients_without_targets_changes_nothing():
    gm = two_linears()
    before = gm.code
    assert project_gradients(gm, (), targets=[]).code == before


def test_a_second_reader_of_a_weight_is_refused():
    gm = two_linears()
    weight = next(node for node in gm.graph.nodes if node.name == "w")
    output = next(node for node in gm.graph.nodes if node.op == "output")
    with gm.graph.inserting_before(output):
        gm.graph.call_function(torch.sum, (weight,))
    target = ProjectionTarget(1, "layers.0.w", ProjectedDim.COLS, ("basis", "leaf"))
    with pytest.raises(CaptureError, match=r"layers\.0\.w is read by .*sum"):
        project_gradients(gm, (), targets=[target])


def test_gradcheck_of_the_input_and_bias():
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4, 6), (5, 6), (5,)))
    basis = torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64)).Q
    leaf = torch.zeros(5, 2, dtype=torch.float64)

    def function(x, b):
        return ProjectedLinear.apply(
            x, w.detach(), b, basis, leaf, *(None,) * 4, Settings(WeightLayout.OUT_IN, ProjectedDim.COLS, "", ())
        )

    assert torch.autograd.gradcheck(function, (x, b))


def test_the_products_associate():
    rows, cols = torch.randn(30, 5, dtype=torch.float64), torch.randn(30, 8, dtype=torch.float64)
    grad = rows.T @ cols
    for dim, size in ((ProjectedDim.ROWS, 5), (ProjectedDim.COLS, 8)):
        basis = torch.linalg.qr(torch.randn(size, 3, dtype=torch.float64)).Q
        projected = projected_gradient(rows, cols, basis, dim)
        torch.testing.assert_close(projected, project(grad, basis, dim))
        gram = grad @ grad.T if dim is ProjectedDim.ROWS else grad.T @ grad
        torch.testing.assert_close(sketch(rows, cols, projected, dim), gram @ basis)


def test_the_runner_names_the_pass_that_broke_the_graph():
    def keep(gm, inputs):
        return gm

    def forget(gm, inputs):
        return None

    def break_it(gm, inputs):
        nodes = list(gm.graph.nodes)
        nodes[0].append(nodes[-2])
        return gm

    gm, records = run_passes(two_linears(), (), [keep])
    assert [(r.name, r.num_nodes_before == r.num_nodes_after) for r in records] == [("keep", True)]
    with pytest.raises(RuntimeError, match="pass forget returned a NoneType.*ran before: keep"):
        run_passes(gm, (), [keep, forget])
    with pytest.raises(RuntimeError, match="pass break_it left a malformed graph"):
        run_passes(gm, (), [break_it])


def test_regions_are_blocks_and_their_linear_weights():
    regions = find_regions(llama(3))
    assert [region.name for region in regions] == ["model.layers.0", "model.layers.1", "model.layers.2"]
    assert all(len(region.weights) == 7 for region in regions)
    gpt2_weights = find_regions(gpt2(1))[0].weights
    assert [w.name.removeprefix("transformer.h.0.") for w in gpt2_weights] == [
        "attn.c_attn.weight",
        "attn.c_proj.weight",
        "mlp.c_fc.weight",
        "mlp.c_proj.weight",
    ]
    assert all(w.in_first for w in gpt2_weights)


def test_a_list_inside_a_block_makes_no_regions_of_its_own():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    model = nn.Module()
    model.layers = nn.ModuleList([Block(), Block()])
    model.head = nn.Linear(4, 2)
    assert [(r.name, len(r.weights)) for r in find_regions(model)] == [("layers.0", 2), ("layers.1", 2)]


def capture(function, *inputs):
    """The graph that Dynamo makes of a function."""
    graphs = []

    def keep(gm, _example_inputs):
        graphs.append(copy_graph(gm))
        return gm.forward

    torch.compile(function, backend=keep, fullgraph=True)(*inputs)
    return graphs[0]


def test_checkpointed_linears_are_inlined_and_marked():
    linear = nn.Linear(4, 4)

    def nested(x):
        return checkpoint(lambda y: linear(y).relu(), x, use_reentrant=False) + 1

    gm = capture(lambda x: checkpoint(nested, x, use_reentrant=False) * 2, torch.randn(3, 4))
    assert find_linears(gm) == []
    gm, records = run_passes(gm, (), [inline_checkpoints])
    assert records[0].effect.count == 2, "one inside the other"
    assert len(find_linears(gm)) == 1
    marked = {node.target for node in gm.graph.nodes if "recompute" in node.meta}
    assert marked == {torch._C._nn.linear, "relu", operator.add}
    x = torch.randn(3, 4)
    torch.testing.assert_close(gm(*_by_kind(gm, x, linear))[0], 2 * (linear(x).relu() + 1))


def _by_kind(gm, x, linear):
    values = {"weight": linear.weight, "bias": linear.bias}
    names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    return [next((value for key, value in values.items() if key in name), x) for name in names]


def test_a_checkpoint_that_chooses_what_to_save_is_left_alone():
    def saves_products():
        return create_selective_checkpoint_contexts([torch.ops.aten.mm.default])

    linear = nn.Linear(4, 4, bias=False)
    gm = capture(lambda x: checkpoint(linear, x, use_reentrant=False, context_fn=saves_products), torch.randn(3, 4))
    before = gm.code
    assert inline_checkpoints(gm, ()).code == before


def indexing(index):
    """sin(x[index])"""
    graph = fx.Graph()
    picked = graph.call_function(operator.getitem, (graph.placeholder("x"), index))
    graph.output((graph.call_method("sin", (picked,)),))
    return fx.GraphModule({}, graph)


@pytest.mark.parametrize("index", [(..., [-2], slice(None)), (slice(None), [1]), (..., [-1]), ([0], slice(1, 3))])
def test_single_indices_become_slices_of_equal_value_and_gradient(index):
    x = torch.randn(3, 4, 5, requires_grad=True)
    gm, records = run_passes(indexing(index), (), [slice_single_indices])
    assert records[0].effect.count == 1
    got, expected = gm(x)[0], x[index].sin()
    assert torch.equal(got, expected)
    assert torch.equal(*(torch.autograd.grad(value.sum(), x)[0] for value in (got, expected)))


@pytest.mark.parametrize("index", [(..., [0, 1]), ([0], [1]), (slice(None), 1)])
def test_other_indices_stay(index):
    gm = indexing(index)
    before = gm.code
    gm, records = run_passes(gm, (), [slice_single_indices])
    assert records[0].effect.count == 0 and gm.code == before


@pytest.mark.parametrize(
    ("product", "layout"),
    [
        (lambda x, w: x @ w, WeightLayout.IN_OUT),
        (lambda x, w: x @ w.T, WeightLayout.OUT_IN),
        (lambda x, w: torch.matmul(x, w.t()), WeightLayout.OUT_IN),
        (lambda x, w: x.mm(w), WeightLayout.IN_OUT),
        (lambda x, w: nn.functional.linear(x, w.T), WeightLayout.IN_OUT),
        (lambda x, w: torch.addmm(x, x, w), WeightLayout.IN_OUT),
    ],
)
def test_products_in_every_form_are_found_and_projected(product, layout):
    x, weight = torch.randn(3, 4, requires_grad=True), nn.Parameter(torch.randn(4, 4))
    gm = capture(product, x, weight)
    (site,) = find_linears(gm)
    assert site.layout is layout
    record = ProjectedParameter.create(
        "w", weight, ProjectedDim.COLS, 2, random_basis((4, 2), torch.Generator().manual_seed(0))
    )
    names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    target = ProjectionTarget(names.index(site.weight.name), "w", record.dim, ("basis", "leaf"))
    gm = project_gradients(gm, (), targets=[target])
    given = [weight if name == site.weight.name else x for name in names]
    gm(*given, record.basis, record.leaf)[0].square().sum().backward()
    grad_x, grad_w = torch.autograd.grad(product(x, weight).square().sum(), (x, weight))
    torch.testing.assert_close(x.grad, grad_x)
    torch.testing.assert_close(record.leaf.grad, grad_w @ record.basis)
    assert weight.grad is None


def test_a_transposed_weight_that_is_read_twice_is_refused():
    def function(x, w):
        transposed = w.T
        return x @ transposed + transposed.sum()

    gm = capture(function, torch.randn(3, 4), nn.Parameter(torch.randn(4, 4)))
    (site,) = find_linears(gm)
    index = [node for node in gm.graph.nodes if node.op == "placeholder"].index(site.weight)
    target = ProjectionTarget(index, "w", ProjectedDim.COLS, ("basis", "leaf"))
    with pytest.raises(CaptureError, match="w is read by .*sum"):
        project_gradients(gm, (), targets=[target])
