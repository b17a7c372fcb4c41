"""Makes a step read and write the optimizer's states in 8 bits, inside the one compiled body.

    before   grad, m, v, numbers                          m.copy_(m'), v.copy_(v')
    after    grad, m, v, m_scales, v_scales, numbers
             m, m_scales <- encode(m'), encode of v' alike;  grad <- L

requires  a merged body; its tensors come as whole blocks, (blocks, 256).
ensures   each state is decoded once and encoded once. The low-rank update overwrites the gradient, which is no longer
          needed then, so that a step in slices needs no other memory.

Second moments are never negative and get the unsigned map, which has twice the cells. The graph shows which states are
never negative: a sum of squares, a maximum with a magnitude.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import fx

from galore_fx.passes.optimizer_graph.lower_to_subspace import LoweredStep
from galore_fx.runtime.formats.blockwise import decode, encode

_ALWAYS = frozenset({"abs", "sqrt", "square", "exp"})
_IF_ALL = frozenset({"add", "mul", "div", "minimum", "amax", "cat", "unsqueeze", "to", "clone", "expand", "view"})


def quantize_states(body: fx.GraphModule, states: Sequence[str], unsigned: Collection[str]) -> fx.GraphModule:
    """Builds the body over 8-bit states.

    Args:
        body: from ``merge_branches``; not changed.
        states: names of its state tensors, all in 8 bits.
        unsigned: names of the states that are never negative.

    Returns:
        A graph over (weight if unprojected, grad, codes of each state, scales of each state, projected weight if
        needed, numbers) that changes all inputs before the projected weight in place and returns nothing.
    """
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    # By target: FX renames a node whose name is a Python builtin, such as Adagrad's sum.
    old = {str(node.target): node for node in body.graph.nodes if node.op == "placeholder"}
    inputs = {name: graph.placeholder(name) for name in old if name != "numbers" and name != "projected_weight"}
    scales = {name: graph.placeholder(f"{name}_scales") for name in states}
    for name in ("projected_weight",) if "projected_weight" in old else ():
        inputs[name] = graph.placeholder(name)
    inputs["numbers"] = graph.placeholder("numbers")
    for name, node in old.items():
        values[node] = inputs[name]
        if name in states:
            values[node] = _inlined(graph, decode, (inputs[name], scales[name]), signed=name not in unsigned)
    written: list[tuple[fx.Node, Any]] = []
    for node in body.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            if node.args[0] is not None:
                written.append((inputs["grad"], values[node.args[0]]))
        elif node.target == "copy_" and node.args[0].target in states:
            name = node.args[0].target
            coded = _inlined(graph, encode, (values[node.args[1]],), signed=name not in unsigned)
            written += zip((inputs[name], scales[name]), coded, strict=True)
        elif node.target == "copy_":
            written.append((inputs[node.args[0].target], values[node.args[1]]))
        else:
            values[node] = graph.node_copy(node, lambda n: values[n])
    for target, value in written:
        graph.call_method("copy_", (target, value))
    graph.output(None)
    graph.lint()
    return fx.GraphModule({}, graph, "QuantizedBody")


def _inlined(graph: fx.Graph, function: Callable[..., Any], arguments: Sequence[fx.Node], *, signed: bool) -> Any:
    """Inlines decode or encode into the graph, with the numbers of the map as literals; returns the result's nodes.

    Dynamo would turn these numbers into inputs with guards, because it treats floats as dynamic.
    """
    tracer = fx.proxy.GraphAppendingTracer(graph)
    made = function(*(fx.Proxy(node, tracer) for node in arguments), signed)
    return tuple(each.node for each in made) if isinstance(made, tuple) else made.node


def never_negative(branches: Sequence[tuple[LoweredStep, Sequence[float]]], states: Sequence[str]) -> set[str]:
    """Returns the states that stay at or above zero in every branch if they start there.

    Args:
        branches: lowered steps with the numbers of each body; the signs of the numbers are assumed not to change.
        states: names of the state tensors, in the order of the bodies' outputs after the first.
    """
    found = set(states)
    while True:
        kept = {
            name
            for position, name in enumerate(states)
            if name in found and all(_outputs(step, numbers, found)[1 + position] for step, numbers in branches)
        }
        if kept == found:
            return found
        found = kept


def _outputs(step: LoweredStep, numbers: Sequence[float], assumed: Collection[str]) -> list[bool]:
    """Returns for each output of a body whether it is provably not negative if the states in ``assumed`` are not."""
    placeholders = [node for node in step.body.graph.nodes if node.op == "placeholder"]
    known: dict[fx.Node, bool] = dict.fromkeys(placeholders, False)
    known.update((node, name in assumed) for node, name in zip(placeholders, step.inputs, strict=False))

    def of(value: Any) -> bool:
        if isinstance(value, fx.Node):
            return known[value]
        if isinstance(value, list | tuple):
            return all(map(of, value))
        return isinstance(value, int | float) and value >= 0

    for node in step.body.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            return [of(value) for value in node.args[0]]
        name = _name_of(node)
        if name == "getitem" and node.args[0] is placeholders[-1]:
            known[node] = numbers[node.args[1]] >= 0
        elif name == "mul" and node.args[0] is node.args[1]:
            known[node] = True
        elif name == "maximum":
            known[node] = any(map(of, node.args))
        elif name == "to":
            known[node] = of(node.args[0])
        else:
            known[node] = name in _ALWAYS or (name in _IF_ALL and all(map(of, node.args)))
    raise AssertionError("a body has an output")


def _name_of(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__)
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))
