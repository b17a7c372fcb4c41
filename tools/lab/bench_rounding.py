"""Benchmarks a training step in bfloat16: weights rounded to nearest, as in torch, and stochastically, in turn."""

import argparse
from typing import Any

import torch
from tabulate import tabulate

from tools.lab.bench_step import CASES, galore_fx_contender, make_batches, timed
from tools.lab.rows import record_row

_RECIPES: dict[str, dict[str, Any]] = {"auto": {}, "full": {"recipe": "full"}}
_ROUNDINGS = ("nearest", "stochastic")


def add_command(commands: Any) -> None:
    """Adds ``rounding`` to the command line."""
    parser = commands.add_parser("rounding", help="a step in bfloat16 with and without stochastic rounding")
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each")
    parser.add_argument("--case", choices=CASES, default="a")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Times the contenders' steady steps in turn, prints a table and appends a row."""
    shape = CASES[arguments.case]
    batches = make_batches(shape)
    contenders = {
        (recipe, rounding): galore_fx_contender(shape, dtype=torch.bfloat16, rounding=rounding, **parts)
        for recipe, parts in _RECIPES.items()
        for rounding in _ROUNDINGS
    }
    times: dict[tuple[str, str], list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():
        for _ in range(5):  # covers the first updates, which also measure the movement
            contender.step(batches)
    for _ in range(arguments.steps):
        for name, contender in contenders.items():
            times[name].append(timed(lambda contender=contender: contender.step(batches)))
    row: dict[str, Any] = {"case": arguments.case, **shape, "steps": arguments.steps}
    lines = []
    for recipe in _RECIPES:
        nearest, stochastic = (min(times[recipe, rounding]) for rounding in _ROUNDINGS)
        row[recipe] = {
            "nearest_s": round(nearest, 4),
            "stochastic_s": round(stochastic, 4),
            "ratio": round(stochastic / nearest, 3),
        }
        lines.append((recipe, *row[recipe].values()))
    print(tabulate(lines, headers=("recipe", "nearest s", "stochastic s", "ratio")))
    record_row("rounding", row)
