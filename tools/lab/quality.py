"""Measures the cost of a recipe's parts in held-out loss: several recipes on one model and the same tokens.

    python -m tools.lab.quality             runs the missing variants, resumes a stopped one, writes docs/quality.md
    python -m tools.lab.quality galore+     only this study
    python -m tools.lab.quality --all       also more seeds, ranks, gaps and learning rates
    python -m tools.lab.quality --table     only writes the page

Each variant is a run of ``tools/train.py`` (default model, 10 M parameters), ``tools/lab/peers.py``,
``tools/lab/arithmetic.py`` or ``tools/lab/classify.py``. LoRA needs ``pip install -e '.[peers]'``. A run takes two to
ten minutes on two cores.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from galore_fx.cli import train
from tools.lab import arithmetic, classify, peers, quality_picture
from tools.lab.quality_studies import STUDIES, Study
from tools.lab.rows import DOCS, RESULTS, record_row

PAGE = DOCS / "quality.md"
ROWS = RESULTS / "quality.jsonl"
_KEPT = (
    "held_out_loss",
    "exact_match",
    "accuracy",
    "num_trained",
    "train_loss",
    "num_refreshes",
    "refresh_time_s",
    "counted_peak_bytes",
    "stability",
)


def main() -> None:
    """Runs the missing variants and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="*", help=f"of {', '.join(STUDIES)}; default: all")
    parser.add_argument("--all", action="store_true", help="more seeds, ranks, gaps and learning rates too")
    parser.add_argument("--table", action="store_true", help="write the page from what there is")
    parser.add_argument("--only", metavar="VARIANT", help="run this one of the study in this process")
    parser.add_argument("--out", default="runs/quality", help="folder of the runs")
    arguments = parser.parse_args()
    unknown = set(arguments.study) - set(STUDIES)
    if unknown:
        parser.error(f"no study {', '.join(sorted(unknown))}; there are {', '.join(STUDIES)}")
    chosen = [STUDIES[name] for name in arguments.study or STUDIES]
    if arguments.only:
        if len(chosen) != 1 or arguments.only not in chosen[0].all_variants:
            parser.error(f"--only takes a study and one of its variants: {'; '.join(chosen[0].all_variants)}")
        _run(chosen[0], arguments.only, Path(arguments.out))
        return
    for study in chosen if not arguments.table else ():
        for name in study.all_variants if arguments.all else study.variants:
            if (study.name, name) not in _rows():
                print(f"{study.name}: {name} ...", flush=True)
                command = [
                    sys.executable,
                    "-m",
                    "tools.lab.quality",
                    study.name,
                    "--only",
                    name,
                    "--out",
                    arguments.out,
                ]
                subprocess.run(command, check=True)
                _write()
    _write()
    print(PAGE.read_text())


def _run(study: Study, name: str, out: Path) -> None:
    folder = out / study.name / name.replace(", ", "-").replace(" ", "-")
    parts = study.all_variants[name]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.txt").open("a") as output, contextlib.redirect_stdout(output):
        if study.script != "train":
            main = {"arithmetic": arithmetic.main, "classify": classify.main}[study.script]
            command = ["--base", str(out / f"{study.script}-base"), "--steps", str(study.steps)]
            figures = main([*command, *parts])
        elif parts[0] in peers.PEERS:
            figures = peers.main([*parts, "--steps", str(study.steps)])
        else:
            command = ["--out", str(folder), "--steps", str(study.steps), *parts]
            checkpoint = folder / "checkpoint.pt"
            if checkpoint.exists():
                unfinished = torch.load(checkpoint, weights_only=True)["step"] < study.steps
                command.append("--resume" if unfinished else "--overwrite")
            figures = train.main(command)
    row = {"study": study.name, "variant": name, "steps": study.steps, "arguments": parts}
    record_row("quality", row | {key: figures[key] for key in _KEPT if key in figures})


def _rows() -> dict[tuple[str, str], Any]:
    lines = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    return {(row["study"], row["variant"]): row for row in lines if row["steps"] == STUDIES[row["study"]].steps}


def _write() -> None:
    rows = _rows()
    sections = []
    for study in STUDIES.values():
        found = {name: rows[study.name, name] for name in study.all_variants if (study.name, name) in rows}
        if found:
            paragraphs = study.text.format(steps=study.steps).split("\n\n")
            text = "\n\n".join(textwrap.fill(paragraph, 120) for paragraph in paragraphs)
            sections.append(f"## {study.title}\n\n{text}\n\n{_table(study, found)}\n{_over_seeds(found)}")
            if study.name == "recipes":
                quality_picture.draw(found, PAGE.parent / "recipes.svg")
    PAGE.write_text(_TEXT.format(torch=torch.__version__) + "\n".join(sections))


def _table(study: Study, rows: dict[str, Any]) -> str:
    against = rows.get(study.against)
    columns = {
        "variant": lambda name, row: name,
        "exact match": lambda name, row: f"{row['exact_match']:.1%}" if "exact_match" in row else "",
        "accuracy": lambda name, row: f"{row['accuracy']:.2%}" if "accuracy" in row else "",
        "trained": lambda name, row: f"{row['num_trained']:,}" if "num_trained" in row else "",
        "held-out loss": lambda name, row: f"{row['held_out_loss']:.4f}",
        f"to {study.against}": lambda name, row: _ratio(row, against, "held_out_loss"),
        "refreshes": lambda name, row: row.get("num_refreshes") or "",
        "last stability": lambda name, row: _range(row.get("stability")),
        "peak, MiB": lambda name, row: f"{peak / 2**20:.1f}" if (peak := row.get("counted_peak_bytes")) else "",
    }
    table = {title: [make(name, row) for name, row in rows.items()] for title, make in columns.items()}
    return tabulate({title: cells for title, cells in table.items() if any(cells)}, "keys", tablefmt="github")


def _over_seeds(rows: dict[str, Any]) -> str:
    """Returns a table of the variants with several seeds, lowest mean loss first; empty if there are none."""
    seeds: dict[str, list[dict[str, Any]]] = {}
    for name, row in rows.items():
        seeds.setdefault(name.partition(", seed ")[0], []).append(row)
    several = {name: found for name, found in seeds.items() if len(found) > 1}
    if not several:
        return ""
    measures = {"held_out_loss": "loss", "exact_match": "exact match", "accuracy": "accuracy"}
    measured = [key for key in measures if all(key in row for found in several.values() for row in found)]
    headers = ["variant", "seeds", *(f"{measures[key]}: {what}" for key in measured for what in ("mean", "range"))]
    lines = []
    for name, found in sorted(several.items(), key=lambda item: statistics.mean(r["held_out_loss"] for r in item[1])):
        line: list[Any] = [name, len(found)]
        for key in measured:
            values, form = [row[key] for row in found], "{:.4f}" if key == "held_out_loss" else "{:.1%}"
            line += [form.format(statistics.mean(values)), f"{form} to {form}".format(min(values), max(values))]
        lines.append(line)
    return "\n" + tabulate(lines, headers, tablefmt="github", disable_numparse=True) + "\n"


def _ratio(row: dict[str, Any], other: dict[str, Any] | None, key: str) -> str:
    return "" if other is None else f"{row[key] / other[key] - 1:+.2%}"


def _range(stability: dict[str, float] | None) -> str:
    values = sorted(stability.values()) if stability else []
    return f"{values[0]:.2f} to {values[-1]:.2f}" if values else ""


_TEXT = """# What the parts of a recipe cost

Written by `python -m tools.lab.quality` with torch {torch}. Where a study names no other model it is the main job's
Llama of 10 M parameters on its text; the same seed and the same tokens for all variants of a study. Loss in nats per
token on held-out text. Peak: counted, of one step, with an update in `step()`. Commands and commits of the runs are
in [quality.jsonl](../tools/lab/results/quality.jsonl).

AdamW's rows have one learning rate for all parameters, where projected weights train at `scale` times the rate of the
rest. Rates of its own for blocks and rest take AdamW further down, so no lead over it is claimed here.

"""


if __name__ == "__main__":
    main()
