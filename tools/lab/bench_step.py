"""Benchmarks a training step of a Llama: compiled model + fused AdamW, compiled model + galore_torch, galore_fx.

Three models with equal weights live in one process and step in turn, so that slow phases of the machine affect all
alike. A contender's steady time is the minimum over its steps. Its amortised time adds its refresh at a gap of 200: the
reference refreshes all weights in one step of 200, galore_fx one block after the other.

The settings favour galore_fx: rank 128 is d/4 in case a and d/8 in case b, and a smaller rank saves more work.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate
from transformers import LlamaConfig, LlamaForCausalLM

import galore_fx
from galore_fx.runtime.measure.meter import count_memory, tensor_bytes
from tools.lab.rows import record_row

GAP, RANK = 200, 128
CASES: dict[str, dict[str, Any]] = {
    "a": {
        "hidden": 512,
        "intermediate": 1376,
        "layers": 8,
        "heads": 8,
        "vocabulary": 32000,
        "batch": 4,
        "seq": 256,
    },
    "b": {
        "hidden": 1024,
        "intermediate": 2736,
        "layers": 4,
        "heads": 16,
        "vocabulary": 4096,
        "batch": 2,
        "seq": 512,
    },
}


def add_command(commands: Any) -> None:
    """Adds ``step`` to the command line."""
    parser = commands.add_parser("step", help="one training step against plain AdamW and galore_torch")
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each contender (at least 15 for a row)")
    parser.add_argument("--no-svd", action="store_true", help="leave out the reference's refresh step (minutes)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Runs the chosen cases, prints a table and appends a row for each."""
    for case in CASES if arguments.case == "all" else [arguments.case]:
        row = measure(case, arguments.steps, with_svd=not arguments.no_svd)
        print(_table(row))
        if arguments.steps >= 15:
            record_row("step", row)


def measure(case: str, num_steps: int, *, with_svd: bool) -> dict[str, Any]:
    """Measures times in seconds and peaks in MiB of the three contenders; returns the row."""
    shape = CASES[case]
    batches = make_batches(shape)
    contenders = {
        "adamw": adamw_contender(shape),
        "galore_torch": galore_torch_contender(shape),
        "galore_fx": galore_fx_contender(shape),
    }
    row: dict[str, Any] = {"case": case, **shape, "rank": RANK, "gap": GAP, "steps": num_steps}
    row["flop_bound_vs_adamw"] = round(flop_bound(shape), 3)
    steps = {name: functools.partial(c.step, batches) for name, c in contenders.items()}
    for name, step in steps.items():
        start = time.perf_counter()
        for _ in range(3):
            step()
        row[f"{name}_first_steps_s"] = round(time.perf_counter() - start, 1)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(num_steps):
        for name, step in steps.items():
            times[name].append(timed(step))
    for name, contender in contenders.items():
        row[f"{name}_s"] = round(min(times[name]), 4)
        row[f"{name}_median_s"] = round(sorted(times[name])[num_steps // 2], 4)
        counted = count_memory(steps[name], torch.device("cpu"))
        row[f"{name}_peak_mib"] = round((contender.kept_bytes() + counted.transient_peak_bytes) / 2**20, 1)
    _add_amortised(row, contenders, batches, with_svd)
    for rival in ("adamw", "galore_torch"):
        row[f"speed_vs_{rival}"] = round(row[f"{rival}_s"] / row["galore_fx_s"], 3)
        row[f"amortised_speed_vs_{rival}"] = round(row[f"{rival}_amortised_s"] / row["galore_fx_amortised_s"], 3)
    return row


def flop_bound(shape: dict[str, Any]) -> float:
    """Returns an upper bound of the speed-up over AdamW: the ratio of matrix-product FLOPs, attention left out."""
    hidden, inter, tokens = shape["hidden"], shape["intermediate"], shape["batch"] * shape["seq"]
    weights = [(hidden, hidden)] * 4 + [(inter, hidden)] * 2 + [(hidden, inter)]
    head = hidden * shape["vocabulary"]
    full = projected = 6 * tokens * head
    for m, n in weights * shape["layers"]:
        full += 6 * tokens * m * n
        projected += 4 * tokens * m * n + 2 * tokens * RANK * (m + n) + 2 * m * n * RANK
    return float(full / projected)


@dataclasses.dataclass(frozen=True)
class Contender:
    """One of the compared ways to train.

    Attributes:
        step: runs one training step on the batch that its argument returns.
        model: the model.
        optimizer: its optimizer.
    """

    step: Callable[[Callable[[], torch.Tensor]], None]
    model: LlamaForCausalLM
    optimizer: torch.optim.Optimizer

    def kept_bytes(self) -> int:
        """Returns the bytes that live between steps: weights and optimizer state."""
        return tensor_bytes([*self.model.parameters(), *_tensors(self.optimizer)])


def adamw_contender(shape: dict[str, Any]) -> Contender:
    """Returns the whole model compiled, with torch's fused AdamW."""
    model = make_model(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    return _plain(model, optimizer)


def galore_torch_contender(shape: dict[str, Any]) -> Contender:
    """Returns the whole model compiled, with the released GaLoreAdamW; it projects the same weights as galore_fx."""
    from galore_torch import GaLoreAdamW

    model = make_model(shape)
    projected = [p for n, p in model.named_parameters() if "proj" in n]
    others = [p for n, p in model.named_parameters() if "proj" not in n]
    settings = {"rank": RANK, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std"}
    groups = [{"params": others}, {"params": projected, **settings}]
    optimizer = GaLoreAdamW(groups, lr=1e-3, no_deprecation_warning=True)
    return _plain(model, optimizer)


def _plain(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> Contender:
    compiled = torch.compile(model)

    def step(batch: Callable[[], torch.Tensor]) -> None:
        ids = batch()
        compiled(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Contender(step, model, optimizer)


def galore_fx_contender(shape: dict[str, Any], dtype: torch.dtype = torch.float32, **overrides: Any) -> Contender:
    """Returns galore_fx with its default recipe; ``overrides`` replace parts of the recipe."""
    adamw = functools.partial(torch.optim.AdamW, lr=1e-3)
    parts = {"refresh_gap": GAP, **overrides}
    model = galore_fx.compile(make_model(shape).to(dtype), rank=RANK, optimizer=adamw, **parts)
    optimizer = model.galore_fx.optimizer

    def step(batch: Callable[[], torch.Tensor]) -> None:
        ids = batch()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    return Contender(step, model, optimizer)


def _add_amortised(
    row: dict[str, Any], contenders: dict[str, Contender], batches: Callable[[], torch.Tensor], with_svd: bool
) -> None:
    """Adds the mean step times over a whole gap, of steady and refreshing steps, to the row."""
    row["adamw_amortised_s"] = row["adamw_s"]
    row["galore_torch_amortised_s"] = row["galore_torch_s"]
    if with_svd:
        peer = contenders["galore_torch"]
        for state in peer.optimizer.state.values():
            if "projector" in state:
                state["projector"].ortho_matrix = None  # the next step recomputes it
        refresh_s = timed(lambda: peer.step(batches))
        row["galore_torch_refresh_step_s"] = round(refresh_s, 2)
        row["galore_torch_amortised_s"] = round(((GAP - 1) * row["galore_torch_s"] + refresh_s) / GAP, 4)
    ours = contenders["galore_fx"]
    times, num_layers = [], row["layers"]
    for layer in range(num_layers):
        ours.optimizer.counters.num_updates = GAP + layer * GAP // num_layers
        ours.optimizer._open_window()
        times.append(timed(lambda: ours.step(batches)))
    row["galore_fx_refresh_step_s"] = round(min(times), 4)
    row["galore_fx_amortised_s"] = round(
        ((GAP - num_layers) * row["galore_fx_s"] + num_layers * row["galore_fx_refresh_step_s"]) / GAP, 4
    )


def _tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    found = []
    for state in optimizer.state.values():
        for value in state.values():
            found += [value] if isinstance(value, torch.Tensor) else []
            found += [v for v in getattr(value, "__dict__", {}).values() if isinstance(v, torch.Tensor)]
    return found


def make_model(shape: dict[str, Any]) -> LlamaForCausalLM:
    """Returns a Llama of this shape in training mode, always with the same weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        vocab_size=shape["vocabulary"],
        max_position_embeddings=shape["seq"],
    )
    return LlamaForCausalLM(config).train()


def make_batches(shape: dict[str, Any]) -> Callable[[], torch.Tensor]:
    """Returns a function that returns the next random batch, (batch, seq) int64, always in the same sequence."""
    generator = torch.Generator().manual_seed(0)
    size = (shape["batch"], shape["seq"])
    return lambda: torch.randint(0, shape["vocabulary"], size, generator=generator)


def timed(work: Callable[[], object]) -> float:
    """Returns the seconds that some work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _table(row: dict[str, Any]) -> str:
    names = ("adamw", "galore_torch", "galore_fx")
    lines = [
        (
            name,
            row[f"{name}_s"],
            row[f"{name}_amortised_s"],
            row.get(f"{name}_refresh_step_s", "-"),
            row[f"{name}_peak_mib"],
        )
        for name in names
    ]
    ratios = {key: value for key, value in row.items() if "speed" in key or "bound" in key}
    headers = ("contender", "steady s", "amortised s", "refresh step s", "peak MiB")
    return f"case {row['case']}: {ratios}\n{tabulate(lines, headers=headers)}"
