"""Plots the memory through one training step, counted at every allocation: ``docs/step_memory.svg``."""

import argparse
import functools
from pathlib import Path
from typing import Any

from galore_fx.runtime.measure.meter import memory_timeline
from tools.lab import bench_step
from tools.lab.rows import DOCS, record_row

PICTURE = DOCS / "step_memory.svg"
SHAPE = {"hidden": 1024, "intermediate": 2736, "layers": 6, "heads": 16, "vocabulary": 4096, "batch": 1, "seq": 512}
LABELS = {
    "adamw": "torch.compile + fused AdamW",
    "galore_torch": "torch.compile + galore_torch",
    "deferred": "galore_fx",
    "in-backward": "galore_fx, update in the backward",
}


def add_command(commands: Any) -> None:
    """Adds ``memory`` to the command line."""
    parser = commands.add_parser("memory", help="memory through one step, as a picture")
    parser.add_argument("--out", type=Path, default=PICTURE)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Counts a warm step of each contender, plots them and appends a row of peaks."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    makers = {
        "adamw": functools.partial(bench_step.adamw_contender, SHAPE),
        "galore_torch": functools.partial(bench_step.galore_torch_contender, SHAPE),
        "deferred": functools.partial(bench_step.galore_fx_contender, SHAPE),
        "in-backward": functools.partial(bench_step.galore_fx_contender, SHAPE, update="in-backward"),
    }
    figure, axes = pyplot.subplots(figsize=(9, 4.2))
    row: dict[str, Any] = {**SHAPE, "rank": bench_step.RANK}
    for name, make in makers.items():
        kept, timeline = _counted(make())
        sizes = [(kept + live) / 2**20 for _, live in timeline]
        row[f"{name}_peak_mib"], row[f"{name}_kept_mib"] = round(max(sizes), 1), round(kept / 2**20, 1)
        times = [100 * time / timeline[-1][0] for time, _ in timeline]
        label = f"{LABELS[name]}: peak {max(sizes):.0f} MiB"
        line = axes.step(times, sizes, where="post", label=label, linewidth=1.2)
        axes.axhline(kept / 2**20, color=line[0].get_color(), linewidth=0.6, linestyle=":")
    axes.set_xlabel("one step, % of its time")
    axes.set_ylabel("MiB (dotted: kept between steps)")
    axes.set_ylim(0)
    axes.set_title(
        f"Memory of a {_millions(SHAPE):.0f} M Llama in float32, {SHAPE['seq']} tokens, counted", fontsize=10
    )
    axes.legend(fontsize=8, loc="lower center")
    figure.tight_layout()
    figure.savefig(arguments.out, metadata={"Date": None})
    record_row("memory", row)
    print(f"wrote {arguments.out}: {row}")


def _counted(contender: bench_step.Contender) -> tuple[int, list[tuple[float, int]]]:
    batches = bench_step.make_batches(SHAPE)
    for _ in range(4):
        contender.step(batches)
    timeline = memory_timeline(lambda: contender.step(batches))
    return contender.kept_bytes(), timeline


def _millions(shape: dict[str, int]) -> float:
    model = bench_step.make_model({**shape})
    return float(sum(p.numel() for p in model.parameters())) / 1e6
