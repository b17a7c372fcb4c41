"""Runs passes in order; names, times and verifies each, and records its effect for ``explain``."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

from torch import fx

GraphPass = Callable[[fx.GraphModule, Sequence[object]], fx.GraphModule]


_EFFECT = "galore_fx_effect"


@dataclasses.dataclass(frozen=True)
class Effect:
    """Effect of a pass, as the pass reports it.

    Attributes:
        count: number of changes.
        what: description of the changed items.
        bytes_before: bytes of the affected values before the pass; None if the pass is not about bytes.
        bytes_after: bytes of the values that replace them; None likewise.
    """

    count: int
    what: str
    bytes_before: int | None = None
    bytes_after: int | None = None


@dataclasses.dataclass(frozen=True)
class PassRecord:
    """Record of one pass.

    Attributes:
        name: name of the pass.
        time_s: seconds.
        num_nodes_before: nodes of the graph before the pass.
        num_nodes_after: nodes of the graph after the pass.
        effect: the effect that the pass reported, None for none.
    """

    name: str
    time_s: float
    num_nodes_before: int
    num_nodes_after: int
    effect: Effect | None = None


def note_effect(gm: fx.GraphModule, effect: Effect) -> None:
    """Records the effect of a pass on the graph that the pass returns."""
    gm.meta[_EFFECT] = effect


def run_passes(
    gm: fx.GraphModule, example_inputs: Sequence[object], passes: Sequence[GraphPass]
) -> tuple[fx.GraphModule, list[PassRecord]]:
    """Applies ``passes`` to ``gm`` in order.

    Returns:
        The graph after the last pass, and one record per pass.

    Raises:
        RuntimeError: a pass did not return a graph, or a malformed one; the message names it and the passes before it.
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
