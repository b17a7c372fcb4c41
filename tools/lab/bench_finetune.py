"""Benchmarks fine-tuning with frequent refreshes: galore_torch, dominated by its SVDs, against galore_fx's galore+.

The model is a Llama of hidden size 2048 with a small batch. The mean step of a gap averages its steady and refreshing
steps: the peer refreshes all weights in one step, galore_fx one block at a time. ``share`` is the part of the mean step
that refreshing takes. For galore_fx, slowest over median covers all steps of three whole gaps, machine noise included.
"""

import argparse
import functools
import statistics
from typing import Any

from tabulate import tabulate

from tools.lab.bench_step import galore_fx_contender, galore_torch_contender, make_batches, timed
from tools.lab.rows import record_row

SHAPE = {
    "hidden": 2048,
    "intermediate": 5504,
    "layers": 2,
    "heads": 16,
    "vocabulary": 4096,
    "batch": 1,
    "seq": 256,
}
GAP, LONG_GAP = 10, 200
OURS: dict[str, dict[str, Any]] = {
    "galore+": {"recipe": "galore+", "residual_warm_up": 1},
    "galore+, residual=drop": {"recipe": "galore+", "residual": "drop"},
    "auto": {"recipe": "auto"},
}


def add_command(commands: Any) -> None:
    """Adds ``finetune`` to the command line."""
    parser = commands.add_parser("finetune", help="a fine-tuning step at a gap of 10 against galore_torch")
    parser.add_argument("--gaps", type=int, default=3, help="whole gaps that are timed of ours")
    parser.add_argument("--no-svd", action="store_true", help="leave out the peer's refreshing step (minutes)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Times the contenders, prints a table and appends a row."""
    batches = make_batches(SHAPE)
    row: dict[str, Any] = {**SHAPE, "gap": GAP, "rank": 128}
    row["galore_torch"] = _peer(batches, with_svd=not arguments.no_svd)
    mean_s = row["galore_torch"]["mean_step_s"]
    lines = [("galore_torch", *row["galore_torch"].values(), "", "")]
    for name, settings in OURS.items():
        figures = _ours(settings, batches, arguments.gaps)
        figures["speed_vs_galore_torch"] = round(mean_s / figures["mean_step_s"], 2)
        row[name] = figures
        lines.append((name, *figures.values()))
    headers = (
        "contender",
        "steady s",
        "refresh step s",
        "mean step s",
        "share",
        "slowest / median",
        "share at 200",
        "x",
    )
    print(tabulate(lines, headers=headers))
    record_row("finetune", row)


def _peer(batches: Any, *, with_svd: bool) -> dict[str, float]:
    peer = galore_torch_contender(SHAPE)
    step = functools.partial(peer.step, batches)
    refresh_s = timed(step)  # compiles as well
    steady_s = statistics.median(timed(step) for _ in range(7))
    if with_svd:
        for state in peer.optimizer.state.values():
            if "projector" in state:
                state["projector"].ortho_matrix = None  # the next step recomputes it
        refresh_s = timed(step)
    mean_s = ((GAP - 1) * steady_s + refresh_s) / GAP
    return {
        "steady_s": round(steady_s, 3),
        "refresh_step_s": round(refresh_s, 2),
        "mean_step_s": round(mean_s, 3),
        "refresh_share": round(1 - steady_s / mean_s, 3),
        "slowest_to_median": round(refresh_s / steady_s, 2),
    }


def _ours(settings: dict[str, Any], batches: Any, num_gaps: int) -> dict[str, float]:
    contender = galore_fx_contender(SHAPE, refresh_gap=GAP, **settings)
    optimizer: Any = contender.optimizer
    step = functools.partial(contender.step, batches)
    for _ in range(2 * GAP):  # the first refreshes; compiles all graphs
        step()
    assert optimizer.counters.num_updates % GAP == 0
    steady, refreshing = [], []
    for _ in range(num_gaps * GAP):
        due = bool(optimizer.refreshes.queue.due_since)
        (refreshing if due else steady).append(timed(step))
    times = [*steady, *refreshing]
    # Medians, because the mean over a whole gap is dominated by noise.
    steady_s, refresh_s = statistics.median(steady), statistics.median(refreshing)
    num_refreshing = len(refreshing) / num_gaps
    mean_s = ((GAP - num_refreshing) * steady_s + num_refreshing * refresh_s) / GAP
    long_s = ((LONG_GAP - num_refreshing) * steady_s + num_refreshing * refresh_s) / LONG_GAP
    return {
        "steady_s": round(steady_s, 3),
        "refresh_step_s": round(refresh_s, 3),
        "mean_step_s": round(mean_s, 3),
        "refresh_share": round(1 - steady_s / mean_s, 4),
        "slowest_to_median": round(max(times) / statistics.median(times), 3),
        "refresh_share_at_gap_200": round(1 - steady_s / long_s, 4),
    }
