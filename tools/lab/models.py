"""Trains a tiny random model of each of 15 transformers families and writes docs/models.md.

    python -m tools.lab.models                 all families, about three minutes
    python -m tools.lab.models Llama T5        these only, printed and not written

For each family it compares the first projected gradients with the plain model's in eager mode and reports the projected
share of the parameters and the loss over five steps. The exit status is 1 if a check fails.
"""

import argparse
import sys

import torch
import transformers
from tabulate import tabulate
from tqdm import tqdm

from tools.lab.model_families import FAMILIES, FamilyReport, train_family
from tools.lab.rows import DOCS

PAGE = DOCS / "models.md"
TOLERANCE = 1e-4
HEADERS = ("family", "class", "kind", "projected", "of all", "worst gradient error", "loss", "block graphs", "logits")
TEXT = """# Models

Written by `python -m tools.lab.models` with torch {torch} and transformers {transformers}: tiny random models (hidden
32, 2 layers, rank 4), one batch, float32, CPU.

- *projected*: weights trained in a subspace, and their share *of all* parameters by elements (in a 7B model the blocks
  are 96 %).
- *worst gradient error*: largest ||R - G Q|| / ||G Q||, R from the compiled model, G from the plain one in eager mode.
  No projected weight had a full gradient.
- *loss*: before the first step and after the fifth, on the same batch.
- *block graphs*: what was captured; equal blocks share one.
- *logits*: "never formed" where head and loss are computed in chunks of tokens.

{table}
"""


def main() -> int:
    """Runs the families and writes the page; returns 1 if a check fails, otherwise 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)}; all by default")
    names = parser.parse_args().families
    unknown = [name for name in names if name not in FAMILIES]
    if unknown:
        parser.error(f"{unknown[0]!r} is not one of {', '.join(FAMILIES)}")
    transformers.logging.set_verbosity_error()
    reports = {}
    for name in tqdm(names or FAMILIES, unit="model", disable=None):
        reports[name] = train_family(FAMILIES[name])
    table = tabulate([_row(name, report) for name, report in reports.items()], headers=HEADERS, tablefmt="github")
    print(table)
    problems = [f"{name}: {problem}" for name, report in reports.items() for problem in _problems(report)]
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 1
    if not names:
        PAGE.write_text(TEXT.format(table=table, torch=torch.__version__, transformers=transformers.__version__))
        print(f"wrote {PAGE}")
    return 0


def _row(name: str, report: FamilyReport) -> tuple[str, ...]:
    family = FAMILIES[name]
    return (
        name,
        family.model_class.__name__,
        family.kind,
        str(report.num_projected),
        f"{report.share:.0%}",
        f"{report.worst_error:.0e}",
        f"{report.losses[0]:.2f} to {report.losses[-1]:.2f}",
        str(report.num_graphs),
        "formed" if report.has_logits else "never formed",
    )


def _problems(report: FamilyReport) -> list[str]:
    checks = {
        f"projected gradients differ by {report.worst_error:.1e}": report.worst_error > TOLERANCE,
        f"{report.num_full} projected weights had a full gradient": report.num_full > 0,
        f"the loss does not fall: {report.losses}": report.losses[-1] >= report.losses[0],
        f"blocks were not captured: {report.uncompiled}": bool(report.uncompiled),
    }
    return [problem for problem, holds in checks.items() if holds]


if __name__ == "__main__":
    sys.exit(main())
