"""Benchmarks one parameter's update with 8-bit states against the 8-bit AdamW of bitsandbytes and torchao."""

import argparse
import importlib.util
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from galore_fx.passes.optimizer_graph.update_compiler import UpdateCompiler
from tools.lab.rows import record_row

COLUMNS = 1024
NUM_STATES = 2
OURS, OURS_FLOAT = "galore_fx, 8 bits", "galore_fx, float32"


def add_command(commands: Any) -> None:
    """Adds ``update`` to the command line."""
    parser = commands.add_parser("update", help="one parameter's update with 8-bit states, beside peers")
    parser.add_argument("--elements", type=int, default=2**23, help="of the parameter (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved updates of each (default: %(default)s)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Times interleaved updates and appends a row of minima."""
    shape = (arguments.elements // COLUMNS, COLUMNS)
    contenders: dict[str, Callable[[], Any]] = {OURS: _ours(shape, 8), OURS_FLOAT: _ours(shape, None)}
    contenders["torch AdamW, fused, float32"] = _stepped(lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True), shape)
    for module, make in (("bitsandbytes", _bitsandbytes), ("torchao", _torchao)):
        if importlib.util.find_spec(module) is None:
            print(f"{module} is not installed: left out (pip install {module})")
            continue
        contenders[f"{module}, 8 bits"] = _stepped(make, shape)
    for update in contenders.values():
        update()
        update()
    best = dict.fromkeys(contenders, float("inf"))
    for _ in range(arguments.rounds):
        for name, update in contenders.items():
            start = time.perf_counter()
            update()
            best[name] = min(best[name], time.perf_counter() - start)
    elements = shape[0] * shape[1] * NUM_STATES
    rows = [(name, f"{1e9 * t / elements:.2f}", f"{t / best[OURS]:.2f}x") for name, t in best.items()]
    print(tabulate(rows, headers=("update", "ns per state element", "time against ours"), tablefmt="github"))
    per_element = {name: round(1e9 * t / elements, 3) for name, t in best.items()}
    record_row("update", {"elements": shape[0] * shape[1], "ns_per_state_element": per_element})


def _parameter(shape: tuple[int, int]) -> nn.Parameter:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parameter = nn.Parameter(0.02 * torch.randn(shape, device=device))
    parameter.grad = 1e-3 * torch.randn(shape, device=device)
    return parameter


def _stepped(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], shape: tuple[int, int]) -> Callable[[], Any]:
    parameter = _parameter(shape)
    optimizer = make([parameter])

    def step() -> None:
        optimizer.step()
        _wait(parameter)

    return step


def _bitsandbytes(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    import bitsandbytes

    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(parameters, lr=1e-3)
    return optimizer


def _torchao(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.optim import AdamW8bit

        optimizer: torch.optim.Optimizer = AdamW8bit(parameters, lr=1e-3)
    return optimizer


def _ours(shape: tuple[int, int], bits: int | None) -> Callable[[], Any]:
    parameter = _parameter(shape)
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    group = optimizer.param_groups[0]
    compiler = UpdateCompiler(torch.optim.AdamW, optimizer.defaults, state_bits=bits)
    layout = compiler.layout(compiler.read(group), group)
    state = layout.format.make(layout.initial, parameter, parameter.dtype)
    state |= {name: torch.tensor(value) for name, value in layout.scalars.items()}
    grad = parameter.grad
    assert grad is not None

    def update() -> None:
        with torch.no_grad():
            compiler.update(parameter, grad, state, group, compiler.read(group), None, 1.0, first=False)
        _wait(parameter)

    return update


def _wait(parameter: nn.Parameter) -> None:
    if parameter.is_cuda:
        torch.cuda.synchronize()
