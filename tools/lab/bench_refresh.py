"""Benchmarks new bases for one Llama layer: galore_torch's SVD against galore_fx's refreshes.

The SVD is of each weight's full gradient, whose computation is not timed. Ours is the additional work of a refreshing
step: the sketch from activations and their gradients, and the orthonormalisation; for queries and keys with cross-head
projection, the drawn heads' gradient and its small eigenproblem. Weights of equal shape are timed once and counted as
often as the layer has them. The data is random with a decaying spectrum; times hardly depend on it.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate

from galore_fx.runtime.subspace.bases import orthonormalize, random_basis, sketch
from galore_fx.runtime.subspace.basis_heads import SampledHeads, basis_of_heads, gradient_of_heads
from galore_fx.runtime.subspace.projection import ProjectedDim, projected_gradient
from tools.lab.bench_step import timed
from tools.lab.rows import record_row

HEAD_SIZE, TOKENS = 128, 1024
INTERMEDIATE = {2048: 5504, 4096: 11008}


def add_command(commands: Any) -> None:
    """Adds ``refresh`` to the command line."""
    parser = commands.add_parser("refresh", help="new bases of one layer: SVD, subspace iteration, cross-head")
    parser.add_argument("--hidden", type=int, nargs="+", default=[2048, 4096], choices=list(INTERMEDIATE))
    parser.add_argument("--ranks", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--repeats", type=int, default=5, help="of ours; the SVD is timed once")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Times all refreshes, prints a table and appends a row for each hidden size and rank."""
    lines = []
    for hidden in arguments.hidden:
        shapes = {"attention": (hidden, hidden), "up": (INTERMEDIATE[hidden], hidden)}
        svd_s = {}
        for name, shape in shapes.items():
            rows, cols = _operands(shape)
            grad = rows.T @ cols
            svd_s[name] = timed(lambda grad=grad: torch.linalg.svd(grad, full_matrices=False))
            print(f"SVD of {shape}: {svd_s[name]:.1f} s", flush=True)
        layer_svd_s = 4 * svd_s["attention"] + 3 * svd_s["up"]
        for rank in arguments.ranks:
            attention = _best(_by_iteration(shapes["attention"], rank), arguments.repeats)
            up = _best(_by_iteration(shapes["up"], rank), arguments.repeats)
            heads = _best(_by_heads(shapes["attention"], rank), arguments.repeats)
            layer_s, crossed_s = 4 * attention + 3 * up, 2 * heads + 2 * attention + 3 * up
            row = {
                "hidden": hidden,
                "rank": rank,
                "tokens": TOKENS,
                "svd_s": {name: round(value, 2) for name, value in svd_s.items()},
                "iteration_s": {"attention": round(attention, 4), "up": round(up, 4)},
                "heads_s": round(heads, 4),
                "layer_svd_s": round(layer_svd_s, 1),
                "layer_iteration_s": round(layer_s, 3),
                "layer_cross_head_s": round(crossed_s, 3),
                "speed": round(layer_svd_s / layer_s, 1),
                "cross_head_speed": round(layer_svd_s / crossed_s, 1),
            }
            record_row("refresh", row)
            lines.append((hidden, rank, *(row[key] for key in _COLUMNS)))
    print(tabulate(lines, headers=("hidden", "rank", *(key.replace("_", " ") for key in _COLUMNS))))


_COLUMNS = ("layer_svd_s", "layer_iteration_s", "layer_cross_head_s", "speed", "cross_head_speed")


def _operands(shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns dY (t, m) and X (t, n), float32, whose product has a decaying spectrum."""
    torch.manual_seed(0)
    m, n = shape
    mixing = torch.randn(TOKENS, TOKENS) * (torch.arange(1, TOKENS + 1) ** -0.5)
    return mixing @ torch.randn(TOKENS, m), mixing @ torch.randn(TOKENS, n)


def _by_iteration(shape: tuple[int, int], rank: int) -> Callable[[], object]:
    rows, cols = _operands(shape)
    basis = random_basis((shape[1], rank), torch.Generator().manual_seed(0))
    projected = projected_gradient(rows, cols, basis, ProjectedDim.COLS)  # part of the steady step
    return lambda: orthonormalize(sketch(rows, cols, projected, ProjectedDim.COLS))


def _by_heads(shape: tuple[int, int], rank: int) -> Callable[[], object]:
    rows, cols = _operands(shape)
    numbers = range(shape[0] // HEAD_SIZE)
    heads = tuple(tuple(range(h * HEAD_SIZE, (h + 1) * HEAD_SIZE)) for h in numbers)
    drawn = SampledHeads(heads, rank, torch.device("cpu"))
    drawn.draw(0)
    dim = ProjectedDim.COLS
    return lambda: basis_of_heads(gradient_of_heads(rows, cols, drawn.features, dim), rank, dim)


def _best(work: Callable[[], object], repeats: int) -> float:
    work()
    return min(timed(work) for _ in range(repeats))
