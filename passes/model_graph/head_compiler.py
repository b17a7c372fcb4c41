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
from galore_fx.passes.pass_runner import run_passes


def compile_head(gm: fx.GraphModule, example_inputs: Sequence[object]) -> Callable[..., Any]:
    """A Dynamo backend: rewrites the loss, runs the graph."""
    gm, _ = run_passes(copy_graph(gm), example_inputs, [chunk_loss])
    forward: Callable[..., Any] = gm.forward
    return forward
