"""Pass on a backward graph: orders all reads of a weight before its update inside the graph.

    before   dX = dY W;  R = consume_gradient(dY, X, W, Z, [])
    after    dX = dY W;  R = consume_gradient(dY, X, W, Z, [dX])

requires  a graph from AOTAutograd; no value computed from a weight also depends on the R of that weight's consumer.
ensures   a consumer takes every value that the graph computes from its weight, so any order of the graph is correct.
          Readers of elementwise values are included, since Inductor recomputes such values where they are read.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from galore_fx.runtime.layers.gradient_consumer import consume_gradient
from galore_fx.runtime.layers.projected_linear import projected_linear
from galore_fx.runtime.torch_private import compile_graph

_NUM_LEADING = 4  # rows, cols, weight, leaf
_INLINED = (
    torch.ops.aten._to_copy.default,
    torch.ops.aten.constant_pad_nd.default,
    torch.ops.aten.clone.default,
    torch.ops.prims.convert_element_type.default,
)


def order_consumers(gm: fx.GraphModule) -> None:
    """Sets the argument ``after`` of each consumer in place."""
    for consumer in gm.graph.find_nodes(op="call_function", target=consume_gradient):
        leading = consumer.args[:_NUM_LEADING]
        made = list(dict.fromkeys(_made_of(leading[2])))
        max([*made, consumer]).append(consumer)  # move the consumer behind the last of them
        consumer.args = (*leading, made)
    gm.graph.lint()
    gm.recompile()


def compile_region(gm: fx.GraphModule, inputs: Sequence[object], activation_budget: float) -> Callable[..., Any]:
    """Compiles the graph of a region with AOTAutograd and Inductor; takes the arguments of ``compile_graph``."""
    linears = gm.graph.find_nodes(op="call_function", target=projected_linear)
    has_consumers = any("basis" not in node.args[3] for node in linears)
    return compile_graph(gm, inputs, activation_budget, on_backward=order_consumers if has_consumers else None)


def _made_of(weight: Any) -> Iterator[fx.Node]:
    """Yields the tensors computed from a weight, from its views, or from elementwise values of these."""
    for reader in weight.users:
        if reader.target is consume_gradient:
            continue
        if _is_view(reader):
            yield from _made_of(reader)
            continue
        if isinstance(reader.meta.get("val"), torch.Tensor):
            yield reader
        else:
            yield from reader.users
        if _is_inlined(reader):
            yield from _made_of(reader)


def _is_view(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


def _is_inlined(node: fx.Node) -> bool:
    is_pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    return is_pointwise or node.target in _INLINED
