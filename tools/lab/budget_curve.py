"""Tightens the budget of one model step by step until nothing fits, and writes docs/budget_curve.md and .svg.

    python -m tools.lab.budget_curve            continues a stopped run
    python -m tools.lab.budget_curve --again    from the beginning

There are two curves: one with rank and states fixed, so that results should be equal, and one with all choices open to
the planner. At each budget the model is compiled and trained for a few steps from the same weights on the same batches;
its peak is counted and its steady step timed, as the minimum of several.
"""

import argparse
import functools
import json
import time
from typing import Any

import torch
import transformers as hf
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

import galore_fx
from galore_fx.planner.verify_peak import counted_peak
from galore_fx.units import format_bytes
from tools.lab.rows import DOCS, RESULTS, record_row

PAGE = DOCS / "budget_curve.md"
ROWS = RESULTS / "budget_curve.jsonl"
LOWEST, STEP = 0.2, 0.1
NUM_STEPS, NUM_TIMED = 6, 8
CURVES: dict[str, dict[str, Any]] = {"rank 0.25": {"rank": 0.25, "state_bits": 32}, "all open": {}}


def make() -> nn.Module:
    """Returns a Llama with 7 M parameters whose activations dominate its memory."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=8, vocab_size=4096,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).train()


def batches() -> list[dict[str, torch.Tensor]]:
    """Returns six batches of random tokens, (8, 128) int64."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randint(3, 4096, (8, 128), generator=generator) for _ in range(NUM_STEPS)]
    return [{"input_ids": ids, "labels": ids} for ids in made]


def main() -> None:
    """Runs the missing budgets and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="forget the rows of earlier runs")
    if parser.parse_args().again:
        ROWS.unlink(missing_ok=True)
    known = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    rows = {(row["curve"], row["share"]): row for row in known}
    shares = [round(1.0 - STEP * i, 2) for i in range(round((1.0 - LOWEST) / STEP) + 1)]
    for curve, settings in CURVES.items():
        loose = 0
        for share in tqdm(shares, desc=curve, unit="budget", disable=None):
            if (curve, share) not in rows:
                row = {"curve": curve, "share": share, **_run(settings, int(share * loose) if loose else 10**12)}
                record_row("budget_curve", row)
                rows[curve, share] = row
            loose = loose or rows[curve, share]["predicted_bytes"]
            if not rows[curve, share]["feasible"]:
                break
    _write(list(rows.values()))


def _run(settings: dict[str, Any], budget: int) -> dict[str, Any]:
    sample, model = batches()[0], make()
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-3)
    try:
        galore_fx.compile(model, budget, sample=sample, optimizer=optimizer, **settings)
    except galore_fx.BudgetError as error:
        return {"feasible": False, "budget_bytes": budget, "error": str(error)}
    plan = model.galore_fx.plan
    losses = [_step(model, batch) for batch in batches()]
    times = []
    for _ in range(NUM_TIMED):
        start = time.perf_counter()
        _step(model, sample)
        times.append(time.perf_counter() - start)
    return {
        "feasible": True,
        "budget_bytes": budget,
        "predicted_bytes": plan.peak_bytes,
        "counted_bytes": counted_peak(model, sample),
        "predicted_s": plan.seconds,
        "step_s": min(times),
        "losses": losses,
        "recipe": plan.recipe.name,
        "rank": plan.recipe.rank,
        "state_bits": plan.recipe.state_bits,
        "update": plan.recipe.update,
        "activation_policy": list(plan.activation_policy),
    }


def _step(model: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    loss = model(**batch).loss
    loss.backward()
    model.galore_fx.optimizer.step()
    return loss.item()


def _write(rows: list[dict[str, Any]]) -> None:
    headers = ("budget", "counted peak", "quality", "update", "blocks keep", "step s", "by the roofline", "losses")
    parts = []
    for curve in CURVES:
        found = [row for row in rows if row["curve"] == curve]
        references = {_quality(row): row["losses"] for row in reversed(found) if row["feasible"]}
        table = tabulate([_cells(row, found[0], references) for row in found], headers=headers, tablefmt="github")
        parts.append(f"## {curve.capitalize()}\n\n{table}\n")
        assert all(row["counted_bytes"] <= row["budget_bytes"] + 64 for row in found if row["feasible"]), "over budget"
    PAGE.write_text(_TEXT.format(torch=torch.__version__, tables="\n".join(parts)))
    _draw(rows)
    print(PAGE.read_text())


def _quality(row: dict[str, Any]) -> str:
    rank = "full rank" if row["recipe"] == "full" else f"rank {row['rank']:g}"
    return f"{rank}, 8-bit states" if row.get("state_bits") == 8 else rank


def _cells(row: dict[str, Any], loose: dict[str, Any], references: dict[str, list[float]]) -> tuple[str, ...]:
    if not row["feasible"]:
        return (format_bytes(row["budget_bytes"]), "", "", "", "", "", "", "refused")
    policy = row["activation_policy"]
    kept = ", ".join(f"{policy.count(share)} x {share:g}" for share in sorted(set(policy), reverse=True))
    reference = references[_quality(row)]
    difference = max(abs(a / b - 1) for a, b in zip(row["losses"], reference, strict=True))
    told = "the reference" if row["losses"] is reference else "equal bits" if not difference else f"{difference:.0e}"
    budget = "none" if row is loose else format_bytes(row["budget_bytes"])
    return (
        budget,
        format_bytes(row["counted_bytes"]),
        _quality(row),
        row["update"],
        kept,
        f"{row['step_s']:.3f}",
        f"{row['predicted_s'] / loose['predicted_s']:.3f}",
        told,
    )


def _draw(rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 5))
    for curve in CURVES:
        found = [row for row in rows if row["curve"] == curve and row["feasible"]]
        budgets = [min(row["budget_bytes"], found[0]["predicted_bytes"]) / 2**20 for row in found]
        above.plot(budgets, [row["counted_bytes"] / 2**20 for row in found], marker="o", label=curve)
        below.plot(budgets, [row["step_s"] for row in found], marker="o", label=curve)
    above.plot(above.get_xlim(), above.get_xlim(), color="black", linestyle="--", label="the budget itself")
    above.set_ylabel("counted peak, MiB")
    above.legend(fontsize=8)
    below.set_ylabel("step, s")
    below.set_ylim(bottom=0)
    below.set_xlabel("budget, MiB")
    figure.tight_layout()
    figure.savefig(PAGE.with_suffix(".svg"), metadata={"Date": None})


_TEXT = """# One model under tighter and tighter budgets

Written by `python -m tools.lab.budget_curve` with torch {torch} on two CPU cores: a Llama of 7 M parameters, 8 x 128
tokens, float32, AdamW. *Blocks keep*: how many of the six blocks keep which share of their activations. *Losses*:
largest relative difference of the losses of the first six steps from those of the loosest budget of the same quality;
recomputed kernels are fused differently, so sums may be added up in another order. *By the roofline*: the planner's
own time, relative to the loosest; the measured ones vary by a tenth.

![Counted peak and step time against the budget](budget_curve.svg)

{tables}"""


if __name__ == "__main__":
    main()
