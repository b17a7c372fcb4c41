"""Merges the branches of an optimizer step into one body, so that a step count that changes branch compiles nothing.

RAdam changes its formula at about the sixth step; SGD creates in its first step the momentum that later steps read:

    branches   body_0(inputs, numbers_0) -> values_0          taken while guard_0 holds
               body_1(inputs, numbers_1) -> values_1          taken while guard_1 holds
    merged     inputs, (k, numbers_0, numbers_1) -> where(k == 1, values_1, values_0), written in place

The bodies are elementwise and fused into one kernel, so a branch that is not taken costs arithmetic but no memory
traffic. Its numbers are zero; its results, which may be NaN, are not selected.
"""

import operator
from collections.abc import Sequence

import torch
from torch import fx

from galore_fx.passes.optimizer_graph.lower_to_subspace import LoweredStep

_FIRST_NUMBER = 1  # numbers[0] is the index of the branch that is taken


def merge_branches(branches: Sequence[LoweredStep], *, projected: bool) -> fx.GraphModule:
    """Builds the body of a step with one or several branches.

    Args:
        branches: lowered steps of one class over the same tensors.
        projected: whether the parameter is projected.

    Returns:
        A graph over (weight if unprojected, grad, state tensors, ..., projected weight if any branch needs it, numbers)
        that writes the new weight and state in place and returns L, or None if unprojected.
    """
    graph = fx.Graph()
    names = [name for name in branches[0].inputs if name != "projected_weight"]
    inputs = {name: graph.placeholder(name) for name in names}
    if any(branch.needs_weight for branch in branches):
        inputs["projected_weight"] = graph.placeholder("projected_weight")
    numbers = graph.placeholder("numbers")
    taken = graph.call_function(operator.getitem, (numbers, 0)) if len(branches) > 1 else None
    merged: list[fx.Node] = []
    offset = _FIRST_NUMBER
    for index, branch in enumerate(branches):
        values = _copy_body(graph, branch, inputs, numbers, offset)
        offset += branch.num_slots
        if merged:
            is_taken = graph.call_function(operator.eq, (taken, index))
            values = [
                graph.call_function(torch.where, (is_taken, new, old)) for new, old in zip(values, merged, strict=True)
            ]
        merged = values
    targets = [name for name in names if name != "grad"]
    written = merged[1:] if projected else merged
    for name, value in zip(targets, written, strict=True):
        graph.call_method("copy_", (inputs[name], value))
    graph.output(merged[0] if projected else None)
    graph.lint()
    return fx.GraphModule({}, graph, "Body")


def numbers_of(branches: Sequence[LoweredStep], taken: int, slots: Sequence[float]) -> list[float]:
    """Returns the numbers of a merged body that runs ``branches[taken]`` with ``slots``."""
    numbers = [float(taken)]
    for index, branch in enumerate(branches):
        numbers += slots if index == taken else [0.0] * branch.num_slots
    return numbers


def _copy_body(
    graph: fx.Graph, branch: LoweredStep, inputs: dict[str, fx.Node], numbers: fx.Node, offset: int
) -> list[fx.Node]:
    placeholders = [node for node in branch.body.graph.nodes if node.op == "placeholder"]
    values = {node: inputs[name] for node, name in zip(placeholders, branch.inputs, strict=False)}
    values[placeholders[-1]] = numbers
    for node in branch.body.graph.nodes:
        if node.op == "output":
            return [values[value] for value in node.args[0]]
        if node.op == "placeholder":
            continue
        if node.target is operator.getitem and node.args[0] is placeholders[-1]:
            values[node] = graph.call_function(operator.getitem, (numbers, offset + node.args[1]))
        else:
            values[node] = graph.node_copy(node, lambda n: values[n])
    raise AssertionError("a body has an output")
