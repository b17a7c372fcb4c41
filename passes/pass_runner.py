"""Runs passes in order: names, times and verifies each, and keeps what it changed for ``explain``."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

from torch import fx

GraphPass = Callable[[fx.GraphModule, Sequence[object]], fx.GraphModule]


_EFFECT = "galore_fx_effect"


@dataclasses.dataclass(frozen=True)
class Effect:
    """What a pass says of its work.

    Attributes:
        count: how many times it changed something.
        what: what that is, in words.
        bytes_before: bytes that the rewritten part made before, None where the pass is not about bytes.
        bytes_after: and after.
    """

    count: int
    what: str
    bytes_before: int | None = None
    bytes_after: int | None = None


@dataclasses.dataclass(frozen=True)
class PassRecord:
    """What one pass did: its name, its time in seconds, the graph's nodes before and after, and its own words."""

    name: str
    time_s: float
    num_nodes_before: int
    num_nodes_after: int
    effect: Effect | None = None


def note_effect(gm: fx.GraphModule, effect: Effect) -> None:
    """Called by a pass, on the graph that it returns."""
    gm.meta[_EFFECT] = effect


def run_passes(
    gm: fx.GraphModule, example_inputs: Sequence[object], passes: Sequence[GraphPass]
) -> tuple[fx.GraphModule, list[PassRecord]]:
    """Applies ``passes`` to ``gm`` one after the other.

    Returns:
        The graph after the last pass, and a record per pass.

    Raises:
        RuntimeError: a pass returned something else than a graph, or a malformed one; names it and those before.
    """
    records: list[PassRecord] = []
    for graph_pass in passes:
        name = _name_of(graph_pass)
        before, start = len(gm.graph.nodes), time.perf_counter()
        result = graph_pass(gm, example_inputs)
        done = ", ".join(record.name for record in records) or "none"
        if not isinstance(result, fx.GraphModule):
            raise RuntimeError(
                f"pass {name} returned a {type(result).__name__}, not a GraphModule (ran before: {done})"
            )
        gm = result
        try:
            gm.graph.lint()
        except Exception as error:
            raise RuntimeError(f"pass {name} left a malformed graph: {error} (ran before: {done})") from error
        time_s = time.perf_counter() - start
        records.append(PassRecord(name, time_s, before, len(gm.graph.nodes), gm.meta.pop(_EFFECT, None)))
    return gm, records


def _name_of(graph_pass: GraphPass) -> str:
    inner = graph_pass.func if isinstance(graph_pass, functools.partial) else graph_pass
    return getattr(inner, "__name__", repr(inner))
