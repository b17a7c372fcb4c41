"""The Dynamo backend of what lies outside the blocks: the head and the loss.

The base model (embedding, blocks, final norm) is opaque to it, so Dynamo breaks the model's forward there and gives
the rest, head and loss, as one graph. After ``chunk_loss`` nothing is left that Inductor could fuse; the graph runs as
it is, at no compile time.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from galore_fx.passes.model_graph.chunk_loss import chunk_loss
from galore_fx.passes.model_graph.region_compiler import copy_graph
from galore_fx.passes.pass_runner import PassRecord, run_passes


class HeadCompiler:
    """The Dynamo backend of one model's head and loss.

    Attributes:
        pass_records: what each pass did, per captured graph.
    """

    def __init__(self) -> None:
        self.pass_records: list[list[PassRecord]] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[object]) -> Callable[..., Any]:
        """Rewrites the loss, runs the graph."""
        gm, records = run_passes(copy_graph(gm), example_inputs, [chunk_loss])
        self.pass_records.append(records)
        forward: Callable[..., Any] = gm.forward
        return forward
