"""Measures how much of real gradients the bases capture during a training, relative to the exact basis.

    python -m tools.lab.energy                 default model and text, 400 updates, gap 20; writes docs/energy.md
    python -m tools.lab.energy --updates 100 --gap 50

At some updates a plain copy of the model gives the full gradients G of the same batch. For every weight whose basis P
is renewed in the update, ||G P||^2 is computed with the new basis, with the old one, and with the exact one of the same
rank (SVD). With cross-head projection each head is also compared alone with the exact basis of the whole weight.
"""

import argparse
import functools
import statistics
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

import galore_fx
from galore_fx.cli import train
from galore_fx.runtime.subspace.bases import exact_basis
from galore_fx.runtime.subspace.basis_heads import HeadBasis
from galore_fx.runtime.subspace.projection import ProjectedDim, project
from tools.lab.rows import DOCS, record_row

PAGE = DOCS / "energy.md"
BATCH = 8
VARIANTS: dict[str, dict[str, Any]] = {
    "subspace iteration": {"recipe": "auto", "project": "input"},
    "subspace iteration, cross-head": {"recipe": "auto", "project": "input", "cross_head": "query-key"},
}


def main() -> None:
    """Trains each variant, prints the table and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--gap", type=int, default=20)
    parser.add_argument("--rank", type=int, default=32, help="at most a head's size (32), so that one head is drawn")
    parser.add_argument("--every", type=int, default=80, help="updates between two measurements")
    arguments = parser.parse_args()
    lines = []
    for name, parts in VARIANTS.items():
        for row in _measure(name, parts, arguments):
            record_row("energy", {"variant": name, "gap": arguments.gap, "rank": arguments.rank, **row})
            lines.append((name, *row.values()))
    headers = (
        "basis",
        "update",
        "weights",
        "fresh: mean",
        "fresh: least",
        "old: mean",
        "a head: mean",
        "a head: least",
    )
    table = tabulate(lines, headers=headers, tablefmt="github", floatfmt=".3f")
    print(table)
    PAGE.write_text(_TEXT.format(gap=arguments.gap, rank=arguments.rank, torch=torch.__version__, table=table))


def _measure(name: str, parts: dict[str, Any], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    given = train.parse_arguments(["--steps", str(arguments.updates)])
    torch.manual_seed(0)
    model, sequences, _ = train.model_and_text(given)
    plain = type(model)(model.config).train()
    adamw = functools.partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.0)
    galore_fx.compile(model.train(), rank=arguments.rank, refresh_gap=arguments.gap, optimizer=adamw, **parts)
    optimizer = model.galore_fx.optimizer
    rows, measured = [], 0
    for update in tqdm(range(arguments.updates), desc=name, disable=None):
        ids = sequences.batch(update, BATCH, 0)
        due = set(optimizer.refreshes.queue.turn())
        takes = due and update >= measured + arguments.every
        if takes:
            measured = update
            plain.load_state_dict(model.state_dict())
            plain.zero_grad()
            plain(input_ids=ids, labels=ids).loss.backward()
            before = {record.name: record.basis.clone() for record in optimizer.records}
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        if takes:
            grads = {key: p.grad for key, p in plain.named_parameters()}
            records = [record for record in optimizer.records if id(record.weight) in due]
            rows.append({"update": update, **_shares(records, grads, before)})
    return rows


def _shares(records: list[Any], grads: dict[str, Any], before: dict[str, Tensor]) -> dict[str, Any]:
    fresh, old, by_head = [], [], []
    for record in records:
        grad = grads[record.name]
        exact = exact_basis(grad, record.rank, record.dim)
        assert exact is not None
        best = _energy(grad, exact, record.dim)
        fresh.append(_energy(grad, record.basis, record.dim) / best)
        old.append(_energy(grad, before[record.name], record.dim) / best)
        if isinstance(record.source, HeadBasis):
            for head in record.source.heads._heads:
                part = grad[head]
                by_head.append(_energy(part, record.basis, record.dim) / _energy(part, exact, record.dim))
    return {
        "weights": len(records),
        "fresh_mean": statistics.mean(fresh),
        "fresh_least": min(fresh),
        "old_mean": statistics.mean(old),
        "head_mean": statistics.mean(by_head) if by_head else None,
        "head_least": min(by_head) if by_head else None,
    }


def _energy(grad: Tensor, basis: Tensor, dim: ProjectedDim) -> float:
    return float(project(grad, basis, dim).square().sum())


_TEXT = """# How much of a gradient the bases hold

Written by `python -m tools.lab.energy` with torch {torch}: the main job's Llama of 10 M parameters on its text,
batches of 512 tokens, rank {rank} of 256, gap {gap}. Energy ||G P||^2 by that of the exact basis of the same rank, of
the weights whose bases are renewed in that update: with the *fresh* basis, found from this very gradient, and with
the *old* one. With cross-head projection the queries' and keys' basis comes from one head of 8; *a head*: each head's
own energy by what the exact basis of the whole weight holds of it.

{table}
"""


if __name__ == "__main__":
    main()
