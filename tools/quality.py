"""What the parts of a recipe cost in held-out loss: one model, one text, the same tokens, several recipes.

    python tools/quality.py             runs what is missing, goes on where a stopped run was, writes docs/quality.md
    python tools/quality.py --table     only writes the page

Each variant is a run of ``tools/train.py`` with 1,500 steps of its default model (10 M parameters); about ten minutes
each on two cores.
"""

import argparse
import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench
import torch
import train
from tabulate import tabulate

PAGE = Path(__file__).resolve().parent.parent / "docs" / "quality.md"
ROWS = bench.RESULTS / "quality.jsonl"
STEPS, GAP = 1500, 25
_LAZY = ["--recipe", "q-galore", "--refresh-gap", str(GAP)]
VARIANTS = {
    "adamw": ["--recipe", "full"],
    "galore": ["--recipe", "galore", "--refresh-gap", str(GAP)],
    "q-galore": _LAZY,
    "q-galore, nearest": [*_LAZY, "--part", "rounding=nearest"],
    "q-galore, fixed gap": [*_LAZY, "--part", "refresh=fixed"],
    "q-galore, first vector": [*_LAZY, "--part", "lazy_statistic=first-vector", "--part", "lazy_threshold=0.4"],
    "q-galore, threshold 0.75": [*_LAZY, "--part", "lazy_threshold=0.75"],
}


def main() -> None:
    """Runs what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="write the page from what there is")
    parser.add_argument("--only", choices=VARIANTS, help="run this one in this process")
    parser.add_argument("--out", default="runs/quality", help="folder of the runs")
    arguments = parser.parse_args()
    if arguments.only:
        _run(arguments.only, Path(arguments.out))
        return
    for name in VARIANTS if not arguments.table else ():
        if name not in _rows():
            print(f"{name} ...", flush=True)
            subprocess.run([sys.executable, __file__, "--only", name, "--out", arguments.out], check=True)
    _write(_rows())


def _run(name: str, out: Path) -> None:
    folder = out / name.replace(", ", "-").replace(" ", "-")
    command = ["--out", str(folder), "--steps", str(STEPS), *VARIANTS[name]]
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists() and torch.load(checkpoint, weights_only=True)["step"] < STEPS:
        command.append("--resume")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.txt").open("a") as output, contextlib.redirect_stdout(output):
        figures = train.main(command)
    kept = ("held_out_loss", "train_loss", "num_refreshes", "refresh_time_s", "counted_peak_bytes", "stability")
    bench.record("quality", {"variant": name, "steps": STEPS, "gap": GAP, **{key: figures.get(key) for key in kept}})


def _rows() -> dict[str, Any]:
    lines = ROWS.read_text().splitlines() if ROWS.exists() else []
    return {row["variant"]: row for row in map(json.loads, lines) if row["steps"] == STEPS}


def _write(rows: dict[str, Any]) -> None:
    table = []
    for name in VARIANTS:
        row = rows.get(name)
        if row is not None:
            stability = sorted(row["stability"].values()) if row["stability"] else []
            table.append(
                (
                    name,
                    f"{row['held_out_loss']:.4f}",
                    _against(row, rows.get("galore"), "held_out_loss"),
                    row["num_refreshes"] or "",
                    _against(row, rows.get("q-galore, fixed gap"), "num_refreshes") if row["num_refreshes"] else "",
                    f"{stability[0]:.2f} to {stability[-1]:.2f}" if stability else "",
                    f"{row['counted_peak_bytes'] / 2**20:.1f}" if row["counted_peak_bytes"] else "",
                )
            )
    headers = ("variant", "held-out loss", "to galore", "refreshes", "to a fixed gap", "last stability", "peak, MiB")
    PAGE.write_text(
        _TEXT.format(torch=torch.__version__, steps=STEPS, gap=GAP, table=tabulate(table, headers, tablefmt="github"))
    )
    print(PAGE.read_text())


def _against(row: dict[str, Any], other: dict[str, Any] | None, key: str) -> str:
    return "" if other is None or not other[key] else f"{row[key] / other[key] - 1:+.2%}"


_TEXT = """# What quantised parts cost

Written by `python tools/quality.py` with torch {torch}: the main job's Llama of 10 M parameters and its text, {steps}
steps of 8 x 64 tokens, the same seed and the same tokens for all, gap {gap}, learning rate 2e-3. Loss in nats per token
on held-out text. *Stability*: of the weights' last refreshes, smallest and largest. Peak: counted, of one step, with an
update in `step()`.

{table}
"""


if __name__ == "__main__":
    main()
