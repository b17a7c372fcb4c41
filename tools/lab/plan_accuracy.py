"""Compares predicted with counted peaks of whole training steps and writes docs/plan_accuracy.md.

    python -m tools.lab.plan_accuracy                 all cases, one row each; continues a stopped run
    python -m tools.lab.plan_accuracy llama mlp       these models only; the page shows them and all earlier cases
    python -m tools.lab.plan_accuracy --again         from the beginning

A case is a model, a dtype, a recipe and a budget (a fraction of the loose plan's peak). The step is planned, compiled
and trained. The bytes of a steady and a refreshing step are counted at every allocation; bytes that live between steps
are added.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import galore_fx
from galore_fx.planner.verify_peak import counted_peak
from galore_fx.units import format_bytes
from tools.lab.rows import DOCS, RESULTS, record_row

PAGE = DOCS / "plan_accuracy.md"
ROWS = RESULTS / "plan_accuracy.jsonl"
FRACTIONS = (1.0, 0.8, 0.6)
TOLERANCE = {"float32": 0.005, "bfloat16": 0.02}
_PLAIN = {"bos_token_id": None, "eos_token_id": None}

Made = tuple[nn.Module, Any]


def _tokens(batch: int, seq: int, vocabulary: int) -> Tensor:
    return torch.randint(3, vocabulary, (batch, seq), generator=torch.Generator().manual_seed(0))


def _causal(model: nn.Module, batch: int, seq: int, vocabulary: int) -> Made:
    ids = _tokens(batch, seq, vocabulary)
    return model.train(), {"input_ids": ids, "labels": ids}


def llama(layers: int, hidden: int, batch: int, seq: int) -> Made:
    """Returns a Llama; activations dominate for a large batch, states for a large width."""
    config = hf.LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers, num_attention_heads=8,
        vocab_size=2048, max_position_embeddings=512, **_PLAIN,
    )  # fmt: skip
    return _causal(hf.LlamaForCausalLM(config), batch, seq, 2048)


def qwen2(layers: int, hidden: int, batch: int, seq: int) -> Made:
    """Returns a Qwen2 with grouped keys and values and biases."""
    config = hf.Qwen2Config(
        hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=4096, max_position_embeddings=512, **_PLAIN,
    )  # fmt: skip
    return _causal(hf.Qwen2ForCausalLM(config), batch, seq, 4096)


def gpt2(layers: int, hidden: int, batch: int, seq: int) -> Made:
    """Returns a GPT-2 with dropout and a tied head."""
    config = hf.GPT2Config(n_embd=hidden, n_layer=layers, n_head=8, vocab_size=2048, n_positions=512, **_PLAIN)
    return _causal(hf.GPT2LMHeadModel(config), batch, seq, 2048)


def bert(layers: int, hidden: int, batch: int, seq: int) -> Made:
    """Returns a BERT classifier with dropout."""
    config = hf.BertConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=8,
        vocab_size=2048, max_position_embeddings=512, num_labels=3,
    )  # fmt: skip
    model = hf.BertForSequenceClassification(config).train()
    mask = torch.ones((batch, seq), dtype=torch.int64)
    return model, {"input_ids": _tokens(batch, seq, 2048), "attention_mask": mask, "labels": torch.arange(batch) % 3}


def moe(layers: int, hidden: int, batch: int, seq: int) -> Made:
    """Returns a Mixtral with four experts, two of them for each token."""
    config = hf.MixtralConfig(
        hidden_size=hidden, intermediate_size=hidden * 2, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, vocab_size=2048,
        max_position_embeddings=512, **_PLAIN,
    )  # fmt: skip
    return _causal(hf.MixtralForCausalLM(config), batch, seq, 2048)


class Perceptron(nn.Module):
    """Linear layers with GELU in a list."""

    def __init__(self, layers: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(hidden, hidden), nn.GELU()) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        """Returns the mean square of the output, 0-d float32."""
        for layer in self.layers:
            x = layer(x)
        return x.float().square().mean()


def mlp(layers: int, hidden: int, batch: int, seq: int) -> Made:
    """Returns a plain torch model, not from transformers."""
    return Perceptron(layers, hidden).train(), (torch.randn(batch * seq, hidden),)


MODELS: dict[str, list[tuple[Callable[..., Made], tuple[int, int, int, int]]]] = {
    "llama": [(llama, (4, 128, 8, 128)), (llama, (8, 512, 1, 64))],
    "qwen2": [(qwen2, (4, 128, 8, 128))],
    "gpt2": [(gpt2, (4, 128, 8, 128))],
    "bert": [(bert, (4, 128, 8, 128))],
    "moe": [(moe, (4, 128, 4, 128))],
    "mlp": [(mlp, (4, 256, 8, 128))],
}


def main() -> int:
    """Runs the cases and writes the page; returns 1 if an error exceeds its tolerance, otherwise 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}; all by default")
    parser.add_argument("--again", action="store_true", help="forget the rows of earlier runs")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.models if name not in MODELS]
    if unknown:
        parser.error(f"{unknown[0]!r} is not one of {', '.join(MODELS)}")
    if arguments.again:
        ROWS.unlink(missing_ok=True)
    known = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    done = {row["case"]: row for row in known}
    hf.logging.set_verbosity_error()
    cases = [
        (make, shape, dtype, recipe)
        for name in arguments.models or MODELS
        for make, shape in MODELS[name]
        for dtype in TOLERANCE
        for recipe in ("auto", "galore")
    ]
    for make, shape, dtype, recipe in tqdm(cases, unit="case", disable=None):
        loose = 0
        for fraction in FRACTIONS:
            case = f"{make.__name__} {'-'.join(map(str, shape))} {dtype} {recipe} {fraction}"
            if case not in done:
                row = _run(functools.partial(make, *shape), getattr(torch, dtype), recipe, fraction, loose)
                record_row("plan_accuracy", {"case": case, "dtype": dtype, **row})
                done[case] = row | {"case": case, "dtype": dtype}
            loose = loose or done[case]["predicted_bytes"]
    rows = list(done.values())
    page = tabulate([_cells(row) for row in rows], headers=_HEADERS, tablefmt="github")
    print(page)
    wrong = [row["case"] for row in rows if row["feasible"] and abs(_error(row)) > TOLERANCE[row["dtype"]]]
    PAGE.write_text(_text(rows, page))
    print(f"wrote {PAGE}")
    for case in wrong:
        print(f"outside the tolerance: {case}", file=sys.stderr)
    return 1 if wrong else 0


def _run(make: Callable[[], Made], dtype: torch.dtype, recipe: str, fraction: float, loose: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model, sample = make()
    model.to(dtype)
    if not isinstance(sample, dict):
        sample = tuple(value.to(dtype) for value in sample)
    settings = {"recipe": recipe, "optimizer": functools.partial(torch.optim.AdamW, lr=1e-3)}
    budget = int(fraction * loose) if loose else 10**12
    try:
        galore_fx.compile(model, budget, sample=sample, **settings)
    except galore_fx.BudgetError:
        return {"feasible": False, "budget_bytes": budget}
    plan = model.galore_fx.plan
    return {
        "feasible": True,
        "budget_bytes": budget,
        "predicted_bytes": plan.peak_bytes,
        "counted_bytes": counted_peak(model, sample),
        "chosen": list(plan.chosen),
        "uncaptured": list(plan.prediction.uncaptured),
    }


_HEADERS = ("model layers-hidden-batch-seq", "budget", "predicted", "counted", "error", "chosen")


def _error(row: dict[str, Any]) -> float:
    return float(row["predicted_bytes"] / row["counted_bytes"] - 1)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    case, _, fraction = row["case"].rpartition(" ")
    budget = "loose" if fraction == "1.0" else f"{float(fraction):.0%}"
    if not row["feasible"]:
        return (case, budget, "", "", "", "infeasible, refused")
    chosen = "; ".join(text.split(":")[0] for text in row["chosen"])
    return (
        case,
        budget,
        format_bytes(row["predicted_bytes"]),
        format_bytes(row["counted_bytes"]),
        f"{_error(row):+.2%}",
        chosen,
    )


def _text(rows: list[dict[str, Any]], table: str) -> str:
    counted = [row for row in rows if row["feasible"]]
    worst = {
        dtype: max((abs(_error(row)) for row in counted if row["dtype"] == dtype), default=0.0) for dtype in TOLERANCE
    }
    return f"""# Predicted against counted peak

Written by `python -m tools.lab.plan_accuracy` with torch {torch.__version__} on a CPU: whole steps with forward,
backward, update and refresh, persistent bytes included, the higher of a steady and a refreshing step. The budget is a
fraction of the loose plan's peak; *chosen* is what the planner gave up to meet it.

A plan is of the installed torch. In 2.11 AOTAutograd holds the gradient that enters a block until the block's backward
ends, in 2.13 until its last use; a peak within a backward differs by this tensor.

Worst error: float32 {worst["float32"]:.2%}, bfloat16 {worst["bfloat16"]:.2%}, over {len(counted)} steps.

{table}
"""


if __name__ == "__main__":
    sys.exit(main())
