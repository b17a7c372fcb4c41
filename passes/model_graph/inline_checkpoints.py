"""Pass: inlines checkpointed parts of the graph as ordinary nodes that are marked for recomputation.

    before   y = tag_activation_checkpoint(body, W, x)      body: W, x -> linear(x, W)
    after    y = linear(x, W)                               meta["recompute"] = PREFER_RECOMPUTE

transformers' gradient checkpointing and ``torch.utils.checkpoint`` inside a region produce the first form, which hides
the linears from other passes. AOTAutograd's partitioner reads the same mark in both forms.

requires  a graph from Dynamo.
ensures   unchanged if the checkpoint selects its saved tensors itself (``context_fn``).
"""

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from galore_fx.passes.pass_runner import Effect, note_effect

_CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
_NUMBERS = itertools.count()


def inline_checkpoints(gm: fx.GraphModule, example_inputs: Sequence[object]) -> fx.GraphModule:
    """Inlines the checkpointed bodies of ``gm`` in place, including nested ones; returns ``gm``."""
    count = 0
    while found := [node for node in gm.graph.nodes if _is_plain_checkpoint(gm, node)]:
        count += len(found)
        for node in found:
            _inline(gm, node)
    gm.graph.eliminate_dead_code()
    gm.delete_all_unused_submodules()
    gm.recompile()
    note_effect(gm, Effect(count, "checkpointed parts marked for recomputation"))
    return gm


def _is_plain_checkpoint(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "call_function" or node.target is not _CHECKPOINT:
        return False
    return "_checkpoint_context_fn" not in _body(gm, node).meta and "context_fn" not in node.kwargs


def _body(gm: fx.GraphModule, node: fx.Node) -> Any:
    return gm.get_submodule(node.args[0].target)  # type: ignore[union-attr, arg-type]


def _inline(gm: fx.GraphModule, node: fx.Node) -> None:
    body, prefix = _body(gm, node), node.args[0].target  # type: ignore[union-attr]
    placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
    values: dict[fx.Node, Any] = dict(zip(placeholders, node.args[1:], strict=True))
    number = next(_NUMBERS)  # the partitioner saves a value that one checkpoint reads from an earlier one
    with gm.graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op in ("placeholder", "output"):
                continue
            copied = gm.graph.node_copy(inner, lambda n: values[n])
            if inner.op == "get_attr":
                copied.target = f"{prefix}.{inner.target}"
            else:
                copied.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
                copied.meta["ac_graph_id"] = number
            values[inner] = copied
    output = next(n for n in body.graph.nodes if n.op == "output").args[0]
    for user in list(node.users):
        assert user.target is operator.getitem, "Dynamo hands a checkpoint's outputs on one by one"
        user.replace_all_uses_with(values[output[user.args[1]]])
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)
