"""Pass: replaces the linears of projected weights by linears that deliver the projected gradient.

    before   W, x          linear(x, W, b)
    after    W, x, P, Z    projected_linear(x, W, b, {P, Z}, ...)    P, Z: new placeholders, after all others

torch's multi-head attention likewise becomes ``projected_attention``.

requires  weights are placeholders of the graph; only linears read a projected weight.
ensures   the gradient of W is None; the gradient of Z is R; the new placeholders are in the order of ``targets``.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import fx

from galore_fx.errors import CaptureError
from galore_fx.passes.model_graph.find_linears import (
    AttentionSite,
    LinearSite,
    attention_arguments,
    find_attention_weights,
    find_linears,
    read_product,
)
from galore_fx.passes.pass_runner import Effect, note_effect
from galore_fx.runtime.layers.projected_attention import projected_attention
from galore_fx.runtime.layers.projected_linear import projected_linear
from galore_fx.runtime.subspace.projection import ProjectedDim

_KEPT_META = ("example_value", "nn_module_stack", "stack_trace", "recompute", "ac_graph_id")


@dataclasses.dataclass(frozen=True)
class ProjectionTarget:
    """A weight of the graph with a projected gradient; a weight with a full gradient is no target.

    Attributes:
        placeholder: index among the graph's placeholders.
        name: name of the parameter, for messages.
        dim: the projected dimension.
        inputs: names of the record's tensors for this form of the gradient, in the order of the new placeholders.
        basis_of: placeholder index of the target whose basis this weight uses; None for its own basis.
        is_consumed: whether the weight is updated inside the backward.
        source: name of the source of the next basis; a refreshing graph calls its ``deliver``.
    """

    placeholder: int
    name: str
    dim: ProjectedDim
    inputs: tuple[str, ...]
    basis_of: int | None = None
    is_consumed: bool = False
    source: str = ""


def project_gradients(
    gm: fx.GraphModule, example_inputs: Sequence[object], *, targets: Sequence[ProjectionTarget]
) -> fx.GraphModule:
    """Rewrites ``gm`` in place so that the gradients of ``targets`` leave it projected; returns ``gm``.

    Raises:
        CaptureError: an operation other than a linear reads a target; the gradient of that use would be lost.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    last = placeholders[-1]
    sites: list[LinearSite | AttentionSite] = [*find_linears(gm), *find_attention_weights(gm)]
    made: dict[int, dict[str, fx.Node]] = {}
    for target in targets:
        new = made[target.placeholder] = {}
        for name in target.inputs:
            with gm.graph.inserting_after(last):
                last = new[name] = gm.graph.placeholder(f"{name}_{target.placeholder}")
    for target in targets:
        weight = placeholders[target.placeholder]
        uses = [site for site in sites if site.weight is weight]
        others = _other_readers(weight, uses)
        if others:
            reader = others[0]
            raise CaptureError(
                f"{target.name} is read by {reader.format_node()}, which is not a linear layer; "
                "its projected gradient would miss that use"
            )
        new = made[target.placeholder]
        if target.basis_of is not None and not target.is_consumed:
            new = {"basis": made[target.basis_of]["basis"], **new}
        for site in uses:
            if isinstance(site, AttentionSite):
                _replace_in_attention(site, (new, target.dim.value, target.source))
            else:
                _replace_linear(gm.graph, site, new, target)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    note_effect(gm, _effect(targets, len(placeholders), example_inputs))
    return gm


def _effect(targets: Sequence[ProjectionTarget], num_inputs: int, example_inputs: Sequence[Any]) -> Effect:
    """Returns the effect, with the bytes of the gradients that leave the graph if examples of all inputs are given."""
    what = "weights whose gradient leaves as R"
    if any("source_leaf" in target.inputs for target in targets):
        what += " with the next basis's sketch"
    if any("residual_leaf" in target.inputs for target in targets):
        what += " and some entries of G"
    num_consumed = sum(target.is_consumed for target in targets)
    if num_consumed:
        what += f", {num_consumed} of them after the weight's update"
    num_shared = sum("head_features" in target.inputs for target in targets)
    if num_shared:
        what += f", {num_shared} of them from some heads"
    if len(example_inputs) <= num_inputs:
        return Effect(len(targets), what)
    full = projected = 0
    position = num_inputs
    for target in targets:
        given = dict(zip(target.inputs, example_inputs[position:], strict=False))
        full += example_inputs[target.placeholder].nbytes
        projected += sum(given[name].nbytes for name in target.inputs if name.endswith("leaf"))
        position += len(given)
    return Effect(len(targets), what, full, projected)


def _other_readers(weight: fx.Node, uses: list[LinearSite | AttentionSite]) -> list[fx.Node]:
    """Returns the readers of the weight, or of its transpose, that are none of the products."""
    products = {site.node for site in uses}
    transposed = {site.reader for site in uses} - products
    readers = [*weight.users, *(user for node in transposed for user in node.users)]
    return [reader for reader in readers if reader not in products | transposed]


def _replace_linear(graph: fx.Graph, site: LinearSite, inputs: dict[str, fx.Node], target: ProjectionTarget) -> None:
    site = read_product(site.node)  # read again: an earlier linear may have been replaced
    arguments: tuple[Any, ...] = (site.input, site.weight, site.bias, inputs, site.layout.value)
    arguments += (target.dim.value, target.source)
    with graph.inserting_before(site.node):
        node = graph.call_function(projected_linear, arguments)
    node.meta = {key: site.node.meta[key] for key in _KEPT_META if key in site.node.meta}
    node.meta["galore_fx"] = {"pass": "project_gradients"}
    site.node.replace_all_uses_with(node)
    graph.erase_node(site.node)


def _replace_in_attention(site: AttentionSite, projection: tuple[Any, ...]) -> None:
    """Adds a projection to an attention's node in place; each of its weights may be a target of its own."""
    if site.node.target is not projected_attention:
        site.node.kwargs = attention_arguments(site.node)
        site.node.args = ({},)
        site.node.target = projected_attention
        site.node.meta["galore_fx"] = {"pass": "project_gradients"}
    site.node.args = ({**site.node.args[0], site.name: projection},)  # type: ignore[dict-item]
