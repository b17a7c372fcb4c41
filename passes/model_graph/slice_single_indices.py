"""Pass: replaces indexing with a list of one number by a slice.

    before   y = x[..., [-2], :]
    after    y = x[..., -2:-1, :].clone()

Falcon's multi-query attention indexes in this way. The gradient of a slice is a padding; the gradient of an index is an
accumulating scatter. If the gradient comes from a broadcast attention, Inductor (torch 2.13, CPU) writes this scatter
into an expanded buffer: the values are wrong by half and the heap is corrupted (pytorch/pytorch#188084 describes one
form).

ensures   unchanged if several indices are lists or tensors, since these are paired instead of sliced.
"""

import operator
from collections.abc import Sequence

from torch import fx

from galore_fx.passes.pass_runner import Effect, note_effect


def slice_single_indices(gm: fx.GraphModule, example_inputs: Sequence[object]) -> fx.GraphModule:
    """Rewrites the indexing nodes of ``gm`` in place; returns ``gm``."""
    count = 0
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.target is not operator.getitem or not isinstance(node.args[1], tuple):
            continue
        index = node.args[1]
        lists = [i for i, entry in enumerate(index) if isinstance(entry, list)]
        others = [entry for entry in index if not isinstance(entry, list | slice) and entry is not ...]
        if len(lists) != 1 or others or [type(entry) for entry in index[lists[0]]] != [int]:
            continue
        position, number = lists[0], index[lists[0]][0]
        piece = slice(number, None if number == -1 else number + 1, None)
        node.args = (node.args[0], (*index[:position], piece, *index[position + 1 :]))
        with gm.graph.inserting_after(node):
            copied = gm.graph.call_method("clone", (node,))
        copied.meta = {**node.meta, "galore_fx": {"pass": "slice_single_indices"}}
        node.replace_all_uses_with(copied, delete_user_cb=lambda user, copied=copied: user is not copied)
        count += 1
    gm.recompile()
    note_effect(gm, Effect(count, "single indices became slices"))
    return gm
