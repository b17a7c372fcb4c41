"""Analysis: which nodes of a region's graph multiply an activation by a weight.

F.linear(x, W, b)       Y = X W^T + b    W (out, in)     layout OUT_IN
torch.addmm(b, x, W)    Y = X W + b      W (in, out)     layout IN_OUT   (transformers' Conv1D)
"""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from galore_fx.runtime.compatibility import F_LINEAR


class WeightLayout(enum.Enum):
    """How a weight stores its two dimensions."""

    OUT_IN = "out_in"
    IN_OUT = "in_out"


@dataclasses.dataclass(frozen=True)
class LinearSite:
    """One use of a weight.

    Attributes:
        node: the linear's node.
        weight: the placeholder of the weight.
        layout: how the weight is stored.
    """

    node: fx.Node
    weight: fx.Node
    layout: WeightLayout

    def operands(self) -> tuple[fx.Node, fx.Node, fx.Node | None]:
        """Input, weight and bias of the linear."""
        if self.layout is WeightLayout.OUT_IN:
            names: tuple[str, ...] = ("input", "weight", "bias")
            order = (0, 1, 2)
        else:
            names, order = ("input", "mat1", "mat2"), (1, 2, 0)
        values = [_argument(self.node, position, names[position]) for position in order]
        return values[0], values[1], values[2]


def find_linears(gm: fx.GraphModule) -> list[LinearSite]:
    """Every linear whose weight is an input of the graph, in the order of the graph."""
    sites = []
    for node in gm.graph.nodes:
        layout = _LAYOUTS.get(node.target) if node.op == "call_function" else None
        if layout is None:
            continue
        weight = _argument(node, 1, "weight") if layout is WeightLayout.OUT_IN else _argument(node, 2, "mat2")
        if isinstance(weight, fx.Node) and weight.op == "placeholder" and _is_plain(node, layout):
            sites.append(LinearSite(node, weight, layout))
    return sites


_LAYOUTS: dict[Callable[..., Any], WeightLayout] = {
    F_LINEAR: WeightLayout.OUT_IN,
    torch.nn.functional.linear: WeightLayout.OUT_IN,
    torch.addmm: WeightLayout.IN_OUT,
}


def _is_plain(node: fx.Node, layout: WeightLayout) -> bool:
    """addmm with beta or alpha is not a linear layer."""
    return layout is WeightLayout.OUT_IN or not ({"beta", "alpha", "out"} & node.kwargs.keys())


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if position < len(node.args) else node.kwargs.get(name)
