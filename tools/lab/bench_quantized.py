"""Benchmarks a training step of a Llama with 60 M parameters: recipes galore and q-galore of galore_fx, in turn."""

import argparse
from typing import Any

import torch
from tabulate import tabulate

from galore_fx.runtime.measure.meter import count_memory
from tools.lab.bench_step import CASES, galore_fx_contender, make_batches, timed
from tools.lab.rows import record_row

_SHAPE = CASES["a"]
_CONTENDERS: dict[str, dict[str, Any]] = {
    "galore": {"recipe": "galore"},
    "q-galore": {"recipe": "q-galore"},
    "q-galore, float32 states": {"recipe": "q-galore", "state_bits": 32},
    "galore, 8-bit weights": {"recipe": "galore", "weight_bits": 8},
}


def add_command(commands: Any) -> None:
    """Adds ``quantized`` to the command line."""
    parser = commands.add_parser(
        "quantized", help="a step with quantised weights, bases and states, beside one without"
    )
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Times the contenders' steady steps in turn, prints a table and appends a row."""
    batches = make_batches(_SHAPE)
    contenders = {name: galore_fx_contender(_SHAPE, **settings) for name, settings in _CONTENDERS.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():
        for _ in range(3):
            contender.step(batches)
    for _ in range(arguments.steps):
        for name, contender in contenders.items():
            times[name].append(timed(lambda contender=contender: contender.step(batches)))
    row: dict[str, Any] = {**_SHAPE, "steps": arguments.steps}
    lines = []
    for name, contender in contenders.items():
        counted = count_memory(lambda contender=contender: contender.step(batches), torch.device("cpu"))
        peak_mib = round((contender.kept_bytes() + counted.transient_peak_bytes) / 2**20, 1)
        ratio = round(min(times[name]) / min(times["galore"]), 3)
        row[name] = {"step_s": round(min(times[name]), 4), "to_galore": ratio, "peak_mib": peak_mib}
        lines.append((name, *row[name].values()))
    print(tabulate(lines, headers=("recipe", "steady s", "to galore", "peak MiB")))
    record_row("quantized", row)
