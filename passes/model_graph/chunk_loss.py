"""Pass: fuses a linear head and its cross-entropy into one operation that never forms the full logits.

    before   logits = linear(x, W, b);  loss = cross_entropy(view(float(logits)), y);   return loss, logits
    after    loss = linear_cross_entropy(x, W, b, y);                                    return loss, None

requires  Dynamo's graph of the part after the last block.
ensures   unchanged if anything but the loss reads the logits, or if the loss differs (class weights, label smoothing,
          soft-capped logits, ...); the model then forms its logits. Reads after a graph break are not visible here:
          they get None for the logits, and need keep_logits=True.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from galore_fx.passes.model_graph.find_linears import find_linears
from galore_fx.passes.pass_runner import Effect, note_effect
from galore_fx.runtime.layers.linear_cross_entropy import CHUNK_BYTES, linear_cross_entropy
from galore_fx.runtime.layers.projected_linear import WeightLayout

_SIGNATURE = inspect.signature(torch.nn.functional.cross_entropy)
_PLAIN_SETTINGS = {"weight": None, "size_average": None, "reduce": None, "label_smoothing": 0.0}


def chunk_loss(gm: fx.GraphModule, example_inputs: Sequence[object]) -> fx.GraphModule:
    """Fuses, in place, the heads of ``gm`` whose logits only the loss reads; returns ``gm``."""
    output = next(node for node in gm.graph.nodes if node.op == "output")
    count = logits_bytes = chunk_bytes = 0
    for site in find_linears(gm):
        loss = _loss_of(site.node, output)
        if loss is None or site.layout is not WeightLayout.OUT_IN:
            continue
        given = _loss_arguments(loss)
        arguments = (site.input, site.weight, site.bias, given["target"], given["ignore_index"], given["reduction"])
        with gm.graph.inserting_before(loss):
            fused = gm.graph.call_function(linear_cross_entropy, arguments)
        fused.meta["galore_fx"] = {"pass": "chunk_loss"}
        loss.replace_all_uses_with(fused)
        logits = _same_values(site.node)
        output.args = (tuple(None if value in logits else value for value in output.args[0]),)
        gm.graph.eliminate_dead_code()
        count += 1
        logits_bytes += _bytes(site.node)
        chunk_bytes += min(_bytes(site.node), CHUNK_BYTES)
    gm.recompile()
    note_effect(gm, Effect(count, "heads whose logits are made in chunks", logits_bytes, chunk_bytes))
    return gm


def _loss_of(logits: fx.Node, output: fx.Node) -> fx.Node | None:
    """Returns the cross-entropy that reads the logits, if it is their only reader besides the graph's output."""
    forms = _same_values(logits)
    readers = {user for form in forms for user in form.users} - forms - {output}
    if len(readers) != 1:
        return None
    loss = readers.pop()
    if loss.op != "call_function" or loss.target is not torch.nn.functional.cross_entropy:
        return None
    given = _loss_arguments(loss)
    settings = {name: value for name, value in given.items() if name not in ("input", "target", "ignore_index")}
    plain = settings.pop("reduction") in ("mean", "sum") and settings == _PLAIN_SETTINGS
    return loss if plain and given["input"] in forms and _one_row_per_target(logits, given) else None


def _loss_arguments(loss: fx.Node) -> dict[str, Any]:
    """Returns all arguments of a call of ``F.cross_entropy`` by name, with defaults."""
    bound = _SIGNATURE.bind(*loss.args, **loss.kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _one_row_per_target(logits: fx.Node, given: Mapping[str, Any]) -> bool:
    """Returns whether the loss compares rows of the full logits with class indices, not another view of them."""
    rows, target, whole = (_example(n) for n in (given["input"], given["target"], logits))
    if rows is None or target is None or whole is None:
        return False
    whole_rows = rows.ndim == 2 and rows.shape[-1] == whole.shape[-1]
    return whole_rows and target.ndim == 1 and target.dtype is torch.int64


def _example(value: object) -> torch.Tensor | None:
    example = value.meta.get("example_value") if isinstance(value, fx.Node) else None
    return example if isinstance(example, torch.Tensor) else None


def _bytes(node: fx.Node) -> int:
    """Returns the bytes of a node's value at the captured sizes."""
    example = _example(node)
    assert example is not None, "the loss has looked at its sizes"
    return (
        math.prod(int(size) if isinstance(size, int) else size.node.hint for size in example.shape) * example.itemsize
    )


def _same_values(logits: fx.Node) -> set[fx.Node]:
    """Returns the logits and their copies in another shape or in float32."""
    forms = {logits}
    for node in logits.graph.nodes:
        reshaped = node.op == "call_method" and node.target in ("float", "view", "reshape", "contiguous")
        if reshaped and node.args[0] in forms:
            forms.add(node)
    return forms
