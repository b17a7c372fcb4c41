"""Benchmarks the time to the first finished training step, each start in its own process.

    cold    an empty compile cache, 4 and 24 layers
    warm    the cache that an earlier start has filled

Time counts from ``galore_fx.compile`` on, without imports and the model's construction. ``both_forms_s`` is the time to
the end of the third step, when both forms of the graphs are compiled: the first step refreshes, later ones are steady.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from tools.lab.rows import record_row

SHAPE = {"hidden": 256, "intermediate": 688, "heads": 8, "vocabulary": 2048, "batch": 2, "seq": 64}
LAYERS, DEEP = 4, 24
RANK = 64


def add_command(commands: Any) -> None:
    """Adds ``start`` to the command line."""
    parser = commands.add_parser("start", help="time to the first step: cold, warm, and with 24 layers")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of cold, warm, deep; minima are compared (2)")
    parser.add_argument("--child", type=int, metavar="LAYERS", help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Starts the processes in turn, prints their times and appends a row; ``--child`` measures one start."""
    if arguments.child:
        print(json.dumps(_first_steps(arguments.child)))
        return
    starts: dict[str, list[dict[str, float]]] = {"cold": [], "warm": [], "deep": []}
    with tqdm(total=3 * arguments.rounds, unit="start", disable=None) as progress:
        for _ in range(arguments.rounds):
            with tempfile.TemporaryDirectory() as shallow_cache, tempfile.TemporaryDirectory() as deep_cache:
                for name, layers, cache in (
                    ("cold", LAYERS, shallow_cache),
                    ("warm", LAYERS, shallow_cache),
                    ("deep", DEEP, deep_cache),
                ):
                    starts[name].append(_start(layers, cache))
                    progress.update()
    first = {name: min(each["first_step_s"] for each in found) for name, found in starts.items()}
    both = {name: min(each["both_forms_s"] for each in found) for name, found in starts.items()}
    row = {
        **SHAPE,
        "rank": RANK,
        "layers": LAYERS,
        "deep_layers": DEEP,
        "rounds": arguments.rounds,
        **{f"{name}_first_step_s": round(value, 2) for name, value in first.items()},
        **{f"{name}_both_forms_s": round(value, 2) for name, value in both.items()},
        "warm_over_cold": round(first["warm"] / first["cold"], 3),
        "deep_over_cold": round(first["deep"] / first["cold"], 3),
    }
    record_row("start", row)
    names = {"cold": f"{LAYERS} layers, cold", "warm": f"{LAYERS} layers, warm", "deep": f"{DEEP} layers, cold"}
    table = [(names[name], first[name], first[name] / first["cold"], both[name]) for name in first]
    headers = ("start", "first step s", "ratio", "both forms s")
    print(tabulate(table, headers=headers, floatfmt=".2f"))


def _start(layers: int, cache: str) -> dict[str, float]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    command = [sys.executable, "-m", "tools.lab.bench", "start", "--child", str(layers)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a start with {layers} layers failed:\n{done.stderr[-2000:]}")
    times: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return times


def _first_steps(layers: int) -> dict[str, float]:
    import functools

    import torch

    import galore_fx
    from tools.lab import bench_step

    shape = {**SHAPE, "layers": layers}
    model, next_batch = bench_step.make_model(shape), bench_step.make_batches(shape)
    begin = time.perf_counter()
    galore_fx.compile(model, rank=RANK, optimizer=functools.partial(torch.optim.AdamW, lr=1e-3), stagger=False)
    times = []
    for _ in range(3):
        ids = next_batch()
        model(input_ids=ids, labels=ids).loss.backward()
        model.galore_fx.optimizer.step()
        times.append(time.perf_counter() - begin)
    assert model.galore_fx.stats()["num_region_variants"] == 2
    return {"first_step_s": times[0], "both_forms_s": times[2]}
