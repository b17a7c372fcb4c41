"""Pass: replace the linears of projected weights by ones that deliver the projected gradient.

    before   W, x          linear(x, W, b)
    after    W, x, P, Z    projected_linear(x, W, b, P, Z, ...)      P, Z: new placeholders, after all others

requires  weights are placeholders of the graph; nothing but linears reads a weight that is projected.
ensures   the gradient of W is None; the gradient of Z is R; the new placeholders stand in the order of ``targets``.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import fx

from galore_fx.errors import CaptureError
from galore_fx.passes.model_graph.find_linears import LinearSite, find_linears
from galore_fx.passes.model_graph.projected_linear import projected_linear
from galore_fx.runtime.projected_parameter import GradientForm
from galore_fx.runtime.subspace import ProjectedDim


@dataclasses.dataclass(frozen=True)
class ProjectionTarget:
    """A weight of the graph and how its gradient is projected.

    Attributes:
        placeholder: index among the graph's placeholders.
        name: the parameter's name, for messages.
        dim: the projected dimension.
        form: PROJECTED or SKETCHED; a FULL weight is no target.
    """

    placeholder: int
    name: str
    dim: ProjectedDim
    form: GradientForm


def project_gradients(
    gm: fx.GraphModule, example_inputs: Sequence[object], *, targets: Sequence[ProjectionTarget]
) -> fx.GraphModule:
    """Rewrites ``gm`` (in place) so that the gradients of ``targets`` leave it projected.

    Raises:
        CaptureError: a target is read by something that is not a linear; its full gradient would be lost.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    last = placeholders[-1]
    sites = find_linears(gm)
    for target in targets:
        weight = placeholders[target.placeholder]
        uses = [site for site in sites if site.weight is weight]
        others = set(weight.users) - {site.node for site in uses}
        if others:
            reader = next(iter(others))
            raise CaptureError(
                f"{target.name} is read by {reader.format_node()}, which is not a linear layer; "
                "its projected gradient would miss that use"
            )
        new = []
        for name in ("basis", "leaf", "sketch_leaf")[: 3 if target.form is GradientForm.SKETCHED else 2]:
            with gm.graph.inserting_after(last):
                last = gm.graph.placeholder(f"{name}_{target.placeholder}")
            new.append(last)
        for site in uses:
            _replace(gm.graph, site, new, target.dim)
    gm.graph.lint()
    gm.recompile()
    return gm


def _replace(graph: fx.Graph, site: LinearSite, extra: list[fx.Node], dim: ProjectedDim) -> None:
    basis, leaf, sketch_leaf = (*extra, None)[:3]
    arguments: tuple[Any, ...] = (*site.operands(), basis, leaf, sketch_leaf, site.layout.value, dim.value)
    with graph.inserting_before(site.node):
        node = graph.call_function(projected_linear, arguments)
    node.meta = {
        key: site.node.meta[key] for key in ("example_value", "nn_module_stack", "stack_trace") if key in site.node.meta
    }
    node.meta["galore_fx"] = {"pass": "project_gradients"}
    site.node.replace_all_uses_with(node)
    graph.erase_node(site.node)
