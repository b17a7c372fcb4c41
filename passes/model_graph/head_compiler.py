"""Dynamo backend for the part of the model outside the blocks: head and loss.

The base model (embedding, blocks, final norm) is opaque, so Dynamo breaks the model's forward there and captures the
rest, head and loss, as one graph. ``chunk_loss`` leaves nothing for Inductor to fuse, so the graph runs uncompiled.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from galore_fx.passes.model_graph.chunk_loss import chunk_loss
from galore_fx.passes.model_graph.region_compiler import copy_graph
from galore_fx.passes.pass_runner import PassRecord, run_passes


class HeadCompiler:
    """Dynamo backend for one model's head and loss.

    Attributes:
        pass_records: records of the passes, one list per captured graph.
    """

    def __init__(self) -> None:
        self.pass_records: list[list[PassRecord]] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[object]) -> Callable[..., Any]:
        """Returns the forward of the graph after ``chunk_loss``; ``gm`` itself is not changed."""
        gm, records = run_passes(copy_graph(gm), example_inputs, [chunk_loss])
        self.pass_records.append(records)
        forward: Callable[..., Any] = gm.forward
        return forward
