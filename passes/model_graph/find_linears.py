"""Analysis: lists the nodes of a region's graph that multiply an activation by a weight.

F.linear(x, W, b)           Y = X W^T + b    W (out, in)     layout OUT_IN
torch.addmm(b, x, W)        Y = X W + b      W (in, out)     layout IN_OUT   (transformers' Conv1D)
x @ W, x @ W.T              Y = X W, X W^T                   (Falcon)
F.multi_head_attention_forward(..., W_in, ..., W_out, ...)   linears inside one node (nn.MultiheadAttention)

Each may also have a transposed weight, ``W.T`` or ``W.t()``, which changes the layout.
"""

import dataclasses
import inspect
import operator
from typing import Any

import torch
from torch import fx

from galore_fx.runtime.layers.projected_linear import WeightLayout
from galore_fx.runtime.torch_private import F_LINEAR

_ATTENTION = torch.nn.functional.multi_head_attention_forward
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj_weight")
# Positions and names of input, weight and bias among the arguments of a call.
_INPUT_FIRST = ((0, "input"), (1, "weight"), (2, "bias"))
_BIAS_FIRST = ((1, "mat1"), (2, "mat2"), (0, "input"))
_NO_BIAS = ((0, "input"), (1, "other"), None)
_NO_BIAS_MM = ((0, "input"), (1, "mat2"), None)
_PRODUCTS: dict[object, tuple[WeightLayout, tuple[tuple[int, str] | None, ...]]] = {
    F_LINEAR: (WeightLayout.OUT_IN, _INPUT_FIRST),
    torch.nn.functional.linear: (WeightLayout.OUT_IN, _INPUT_FIRST),
    torch.addmm: (WeightLayout.IN_OUT, _BIAS_FIRST),
    operator.matmul: (WeightLayout.IN_OUT, _NO_BIAS),
    torch.matmul: (WeightLayout.IN_OUT, _NO_BIAS),
    torch.mm: (WeightLayout.IN_OUT, _NO_BIAS_MM),
    "matmul": (WeightLayout.IN_OUT, _NO_BIAS),
    "mm": (WeightLayout.IN_OUT, _NO_BIAS_MM),
}
_OTHER_LAYOUT = {WeightLayout.OUT_IN: WeightLayout.IN_OUT, WeightLayout.IN_OUT: WeightLayout.OUT_IN}


@dataclasses.dataclass(frozen=True)
class LinearSite:
    """One use of a weight in a product.

    Attributes:
        node: the product's node.
        weight: the placeholder of the weight.
        layout: layout of the stored weight.
        reader: the direct user of the weight: the product itself, or a transposition before it.
        input: X.
        bias: the added bias, None for none.
    """

    node: fx.Node
    weight: fx.Node
    layout: WeightLayout
    reader: fx.Node
    input: fx.Node
    bias: fx.Node | None


@dataclasses.dataclass(frozen=True)
class AttentionSite:
    """One use of a weight inside a node of torch's multi-head attention.

    Attributes:
        node: the attention's node.
        weight: the placeholder of the weight.
        name: name of the argument that takes the weight.
    """

    node: fx.Node
    weight: fx.Node
    name: str

    @property
    def reader(self) -> fx.Node:
        """The direct user of the weight: the attention's node."""
        return self.node


def find_linears(gm: fx.GraphModule) -> list[LinearSite]:
    """Returns the products of an activation and a weight, an input of the graph, in graph order."""
    return [site for node in gm.graph.nodes for site in _product(node)]


def read_by_one_linear(gm: fx.GraphModule) -> frozenset[int]:
    """Returns the indices of the graph's inputs that are read by one product and by nothing else."""
    places = {node: place for place, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    alone = (
        s for s in find_linears(gm) if len(s.weight.users) == 1 and (s.reader is s.node or len(s.reader.users) == 1)
    )
    return frozenset(places[site.weight] for site in alone)


def read_product(node: fx.Node) -> LinearSite:
    """Returns the site of a node that is known to be a product; raises ValueError for any other node."""
    (site,) = _product(node)
    return site


def find_attention_weights(gm: fx.GraphModule) -> list[AttentionSite]:
    """Returns the uses of weights, inputs of the graph, inside torch's multi-head attention."""
    sites = []
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.target is not _ATTENTION:
            continue
        given = attention_arguments(node)
        sites += [AttentionSite(node, given[name], name) for name in _ATTENTION_WEIGHTS if _is_input(given.get(name))]
    return sites


def attention_arguments(node: fx.Node) -> dict[str, Any]:
    """Returns the arguments of a call of torch's multi-head attention by name."""
    return dict(inspect.signature(_ATTENTION).bind(*node.args, **node.kwargs).arguments)


def _product(node: fx.Node) -> list[LinearSite]:
    found = _PRODUCTS.get(node.target) if node.op in ("call_function", "call_method") else None
    # addmm with beta or alpha is no linear layer.
    if found is None or {"beta", "alpha", "out"} & node.kwargs.keys():
        return []
    layout, places = found
    x, factor, bias = (None if place is None else _argument(node, *place) for place in places)
    if not (isinstance(x, fx.Node) and isinstance(factor, fx.Node)):
        return []
    weight, reader = factor, node
    if _is_transposition(factor):
        weight, reader, layout = factor.args[0], factor, _OTHER_LAYOUT[layout]  # type: ignore[assignment]
    if not _is_input(weight):
        return []
    return [LinearSite(node, weight, layout, reader, x, bias)]


def _is_transposition(node: fx.Node) -> bool:
    attribute = node.op == "call_function" and node.target is getattr and node.args[1:] == ("T",)
    return attribute or (node.op == "call_method" and node.target == "t")


def _is_input(node: object) -> bool:
    return isinstance(node, fx.Node) and node.op == "placeholder"


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if position < len(node.args) else node.kwargs.get(name)
