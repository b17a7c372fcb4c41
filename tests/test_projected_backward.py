"""The central promise: in the steady backward no value has the shape of a projected weight but the weight itself."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import fx
from torch._functorch import config as functorch_config
from torch._inductor.compile_fx import compile_fx

import galore_fx
from galore_fx.passes.model_graph import region_compiler
from galore_fx.passes.model_graph.order_consumers import order_consumers
from galore_fx.runtime.layers.gradient_consumer import consume_gradient
from galore_fx.runtime.subspace.basis_heads import HeadBasis
from galore_fx.runtime.subspace.projected_parameter import GradientForm
from tests.models import adamw, backward, batches, llama

pytestmark = pytest.mark.usefixtures("without_kernels")

# Tokens 21; weights (64, 64), (32, 64), (176, 64), (64, 176): no dimension of a value is another's by accident.
BATCH, SEQ = 3, 7
VIEWS = ("aten.t.", "aten.permute.", "aten.transpose.", "aten.view.", "aten.alias.")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[fx.GraphModule]]:
    """Collects AOTAutograd's graphs (forward, backward) instead of compiling them to machine code."""
    found: list[fx.GraphModule] = []
    region_compiler.forget_regions()

    def keep(gm: fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> Callable[..., Any]:
        found.append(gm)
        return make_boxed_func(gm.forward)

    monkeypatch.setattr(
        region_compiler,
        "compile_region",
        lambda gm, inputs, activation_budget: compile_fx(gm, list(inputs), inner_compile=keep),
    )
    # AOTAutograd answers from its cache on disk without calling anyone, where a graph has been compiled before.
    with functorch_config.patch(enable_autograd_cache=False):
        yield found
    region_compiler.forget_regions()


def weight_sized_values(gm: fx.GraphModule, shapes: set[tuple[int, ...]]) -> list[fx.Node]:
    """Computed 2-D values of a weight's shape (either way round) that are not views of an input."""

    def is_input(node: fx.Node) -> bool:
        view = node.op == "call_function" and str(node.target).startswith(VIEWS)
        return node.op == "placeholder" or (view and is_input(node.all_input_nodes[0]))

    found = []
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, torch.Tensor):
            shape = tuple(value.shape)
            if (shape in shapes or shape[::-1] in shapes) and not is_input(node):
                found.append(node)
    return found


def _model_and_shapes(form: GradientForm) -> tuple[Any, set[tuple[int, ...]]]:
    model = llama(num_layers=1, num_key_value_heads=2)
    galore_fx.compile(model, rank=8, optimizer=adamw())
    records = list(model.galore_fx.optimizer.records)
    for record in records:
        record.form = form
    return model, {tuple(record.weight.shape) for record in records}


def test_a_refresh_from_one_head_forms_the_gradient_of_this_head_only(graphs):
    model = llama(num_layers=1, num_key_value_heads=2)
    galore_fx.compile(model, rank=8, optimizer=adamw(), project="input", cross_head="query-key")
    backward(model, batches(1, BATCH, SEQ)[0])
    shapes = {tuple(record.weight.shape) for record in model.galore_fx.optimizer.records}
    assert sum(isinstance(record.source, HeadBasis) for record in model.galore_fx.optimizer.records) == 2
    assert all(weight_sized_values(gm, shapes) == [] for gm in graphs)
    # q and k: one head of 16 features by 64 inputs.
    assert len(weight_sized_values(graphs[1], {(16, 64)})) == 2


@pytest.mark.parametrize("form", [GradientForm.PROJECTED, GradientForm.REFRESHING])
def test_no_value_of_a_projected_weights_shape_is_computed(graphs, form):
    model, shapes = _model_and_shapes(form)
    backward(model, batches(1, BATCH, SEQ)[0])
    assert shapes == {(64, 64), (32, 64), (176, 64), (64, 176)}
    assert len(graphs) == 2
    for gm in graphs:
        assert weight_sized_values(gm, shapes) == []


def test_the_plain_graph_fails_the_same_check(graphs):
    model, shapes = _model_and_shapes(GradientForm.FULL)
    backward(model, batches(1, BATCH, SEQ)[0])
    assert len(weight_sized_values(graphs[1], shapes)) >= 7


def test_the_forward_keeps_the_projected_input_where_it_can(graphs):
    """v_proj's input X (21, 64) serves q, k, v; XQ (21, 8) is what the backward of R needs, and it is saved."""
    model, _ = _model_and_shapes(GradientForm.PROJECTED)
    backward(model, batches(1, BATCH, SEQ)[0])
    saved = [node.meta["val"] for node in graphs[1].graph.nodes if node.op == "placeholder"]
    assert any(tuple(value.shape) == (BATCH * SEQ, 8) for value in saved if isinstance(value, torch.Tensor))


def test_an_update_in_the_backward_forms_no_gradient_and_comes_after_all_that_reads_its_weight(graphs):
    model = llama(num_layers=1, num_key_value_heads=2)
    galore_fx.compile(model, recipe="fira", basis="subspace-iteration", rank=8, optimizer=adamw())
    backward(model, batches(1, BATCH, SEQ)[0])
    shapes = {tuple(record.weight.shape) for record in model.galore_fx.optimizer.records}
    assert all(weight_sized_values(gm, shapes) == [] for gm in graphs)
    order_consumers(graphs[1])
    consumers = graphs[1].graph.find_nodes(op="call_function", target=consume_gradient)
    assert len(consumers) == 7
    # What is made of each weight here: its layer's dX.
    assert all(
        len(after) == 1 and after[0].target is torch.ops.aten.mm.default for *_, after in (c.args for c in consumers)
    )
