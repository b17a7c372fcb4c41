"""Pass: dequantises weights and bases that are stored as codes at each read, and again in the backward.

    before   W, x                      linear(x, W)
    after    codes, x, scales, zeros   linear(x, dequantize(codes, scales, zeros))
                                       meta["recompute"] = MUST_RECOMPUTE

Without the mark the partitioner would save the dequantised weight of every layer for the backward, the whole model in
its wide dtype. With it each dequantised weight lives for one product, in the forward and in the backward.

A weight that needs its full gradient also gets a leaf: a zero without storage that is added to the dequantised weight,
so the leaf's gradient is the gradient of the weight.

requires  the stored tensors are placeholders.
ensures   their placeholders receive the codes; scales, zeros and leaf of each target follow all other placeholders, in
          the order of ``targets``.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import CheckpointPolicy

from galore_fx.passes.pass_runner import Effect, note_effect
from galore_fx.runtime.formats.groupwise import dequantize
from galore_fx.runtime.formats.quantized_tensor import QuantizedTensor

# The partitioner saves values that one checkpoint reads from an earlier one; these nodes belong to no checkpoint.
_NO_CHECKPOINT = -1


@dataclasses.dataclass(frozen=True)
class StoredInput:
    """A placeholder for a quantised tensor.

    Attributes:
        placeholder: index of the placeholder.
        tensor: example of the quantised tensor.
        leaf: example of the leaf that receives the gradient; None if no gradient is needed.
    """

    placeholder: int
    tensor: QuantizedTensor
    leaf: Tensor | None

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The inputs that replace the tensor: codes in its position, all others after the other inputs."""
        return (*self.tensor.parts, self.leaf) if self.leaf is not None else self.tensor.parts


def dequantize_inputs(
    gm: fx.GraphModule, example_inputs: Sequence[object], *, targets: Sequence[StoredInput]
) -> fx.GraphModule:
    """Rewrites ``gm`` in place to take the parts of ``targets`` instead of the tensors; returns ``gm``."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    last = placeholders[-1]
    for target in targets:
        codes, made = placeholders[target.placeholder], []
        readers = list(codes.users)
        codes.meta["example_value"] = target.tensor.codes
        for name, example in zip(("scales", "zeros", "leaf"), target.parts[1:], strict=False):
            with gm.graph.inserting_after(last):
                last = gm.graph.placeholder(f"{name}_{target.placeholder}")
            last.meta["example_value"] = example
            made.append(last)
        for reader in readers:  # one per reader, so that no dequantised value lives between readers
            reader.replace_input_with(codes, _dequantized(gm.graph, reader, codes, made, target.tensor))
    gm.recompile()
    stored = sum(part.nbytes for target in targets for part in target.tensor.parts)
    note_effect(
        gm,
        Effect(len(targets), "tensors dequantised as they are read", sum(t.tensor.nbytes for t in targets), stored),
    )
    return gm


def _dequantized(
    graph: fx.Graph, reader: fx.Node, codes: fx.Node, others: Sequence[fx.Node], like: QuantizedTensor
) -> fx.Node:
    scales, zeros, *leaf = others
    arguments: tuple[Any, ...] = (codes, scales, zeros, like.bits, list(like.shape), like.dtype)
    with graph.inserting_before(reader):
        made = [graph.call_function(dequantize, arguments)]
        if leaf:
            made.append(graph.call_function(torch.add, (made[0], leaf[0])))
    for node in made:
        node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        node.meta["ac_graph_id"] = _NO_CHECKPOINT
        node.meta["galore_fx"] = {"pass": "dequantize_inputs"}
    return made[-1]
