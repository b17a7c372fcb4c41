"""Defines ``galore_fx.explain``, which runs the passes on fake tensors; nothing is computed, and no model changes."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import networkx
import torch
from tabulate import tabulate
from torch import fx, nn

from galore_fx.assembly.assemble import Forwards, assemble
from galore_fx.assembly.compiled_model import Compiled
from galore_fx.assembly.decisions import Decisions, decide
from galore_fx.assembly.reparametrize import normalized
from galore_fx.assembly.request import Request
from galore_fx.assembly.user_optimizer import OptimizerChoice, for_a_copy
from galore_fx.errors import ModelError, SettingError
from galore_fx.passes.model_graph.group_heads import HeadGroup
from galore_fx.passes.model_graph.head_compiler import HeadCompiler
from galore_fx.passes.model_graph.region_compiler import RegionCompiler
from galore_fx.passes.pass_runner import PassRecord
from galore_fx.plan_record import ParameterPlan, Plan
from galore_fx.recipes.recipe import Recipe
from galore_fx.runtime.torch_private import FakeTensorMode
from galore_fx.simulation.fake_model import fake_batch, fake_copy, fake_mode
from galore_fx.simulation.fake_run import as_if_real
from galore_fx.simulation.sample import describe_sample
from galore_fx.structure import structure_graph
from galore_fx.units import format_bytes


@dataclasses.dataclass(frozen=True)
class GraphReport:
    """The record of all passes over one graph.

    Attributes:
        graph: description of the graph: a block's, head and loss, or the optimizer step's.
        passes: record of each pass, in order.
    """

    graph: str
    passes: tuple[PassRecord, ...]


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Explains the treatment of a model; ``str()`` returns the report.

    Attributes:
        plan: the plan, with the role of each parameter.
        graphs: record of the passes over each graph.
        uncompiled: blocks that cannot be captured as one graph, each with the reason.
        heads: the attention heads recognised in projected weights, by the weight's name, with one entry per role.
        graph: the structure of the model and the treatment of each part (``structure.structure_graph``), to query, draw
            or write: ``networkx.write_graphml(explanation.graph, "model.graphml")``.
    """

    plan: Plan
    graphs: tuple[GraphReport, ...]
    uncompiled: Mapping[str, str]
    heads: Mapping[str, tuple[HeadGroup, ...]]
    graph: "networkx.DiGraph[str]"

    def __str__(self) -> str:
        parts = ["Graphs", _graph_table(self.graphs), "", "Parameters", _parameter_table(self.plan)]
        parts += ["", "Attention heads", _head_table(self.heads)]
        for name, reason in self.uncompiled.items():
            parts.append(f"not compiled: {name or 'the model'}: {reason}")
        return "\n".join([*parts, "", self.plan.table()])


def explain(
    model: nn.Module,
    sample: object,
    *,
    recipe: str | Recipe = "auto",
    optimizer: OptimizerChoice = torch.optim.AdamW,
    keep_logits: bool = False,
    **overrides: Any,
) -> Explanation:
    """Reports the changes of the passes to a model: node counts, bytes, and why each parameter is projected or not.

    The passes run on fake tensors: neither the model nor a compiled form of it runs, and the model may be on the meta
    device.

    Args:
        model: a plain model, or one compiled by ``galore_fx.compile``, whose own recipe and optimizer are then used.
        sample: a batch as the model takes it.
        recipe, optimizer, keep_logits, **overrides: as in ``galore_fx.compile``.

    Returns:
        The explanation; print it.

    Raises:
        ModelError: the model does not accept the sample, or as in ``galore_fx.compile``.
        SettingError: overrides are given for a compiled model, or as in ``galore_fx.compile``.
        OptimizerError: as in ``galore_fx.compile``.
    """
    compiled = getattr(model, "galore_fx", None)
    if isinstance(compiled, Compiled):
        if overrides:
            raise SettingError(f"the model is compiled; {', '.join(overrides)} cannot be given anew")
        recipe, optimizer = compiled.plan.recipe, compiled.optimizer_choice
        keep_logits = compiled.plan.keep_logits
    elif isinstance(optimizer, torch.optim.Optimizer):
        optimizer = for_a_copy(optimizer)
    mode = fake_mode()
    fake = fake_copy(model, mode)
    request = Request(recipe=recipe, optimizer=optimizer, overrides=overrides)
    with mode, normalized(fake, request) as (asked, normalization):
        if normalization is not None:
            normalization.keep()
    decisions = decide(fake, asked)
    regions, head = RegionCompiler(regions={}, finish=_leave), None if keep_logits else HeadCompiler()
    with mode:
        assembled = assemble(fake, decisions, decisions.optimizer, regions, Forwards(head))
    decisions, records = assembled.decisions, list(assembled.optimizer.records)
    for due in (False, True):
        for record in records:
            record.form = record.form_of(due=due)
        _forward(fake, sample, mode)
    head_passes = [passes for passes in head.pass_records if _changed(passes)] if head else []
    graphs = [
        *_region_reports(decisions, regions),
        *(GraphReport("head and loss", tuple(passes)) for passes in head_passes),
        *_optimizer_reports(decisions),
    ]
    heads = {name: groups for region in regions.regions for name, groups in regions.heads_of(region).items() if groups}
    owners = {record.name: record.basis_owner.name for record in records if record.basis_owner is not None}
    structure = structure_graph(type(model).__name__, decisions.plan, heads, owners)
    return Explanation(decisions.plan, tuple(graphs), assembled.installed.failures, heads, structure)


def _forward(fake: nn.Module, sample: object, mode: FakeTensorMode) -> None:
    args, kwargs = fake_batch(sample, mode)
    try:
        with mode, as_if_real(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # uncompiled blocks are part of the explanation
            fake(*args, **kwargs)
    except Exception as error:
        raise ModelError(
            f"{type(fake).__name__} does not run on fake tensors with the sample {describe_sample(sample)}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _leave(gm: fx.GraphModule, _inputs: Sequence[object], _activation_budget: float) -> Callable[..., Any]:
    forward: Callable[..., Any] = gm.forward
    return forward


def _changed(passes: Sequence[PassRecord]) -> bool:
    return any(record.effect is not None and record.effect.count for record in passes)


def _region_reports(decisions: Decisions, compiler: RegionCompiler) -> list[GraphReport]:
    index = {entry.name: entry.region for entry in decisions.plan.parameters if entry.region is not None}
    reports = []
    for region in compiler.regions:
        blocks = sorted({index[name] for name in compiler.weights_of(region)})
        first = decisions.regions[blocks[0]] if blocks else None
        name = f"block {first.name} ({type(first.module).__name__})" if first and first.name else "the model"
        name += f" and {len(blocks) - 1} like it" if len(blocks) > 1 else ""
        prepared, *variants = region.pass_records
        for form, passes in zip(("steady", "refreshing"), variants, strict=False):
            reports.append(GraphReport(f"{name}, {form}", (*prepared, *passes)))
    return reports


def _optimizer_reports(decisions: Decisions) -> list[GraphReport]:
    group, name = decisions.optimizer.param_groups[0], type(decisions.optimizer).__name__
    kinds = {"of a projected parameter": True, "of a parameter at full rank": False}
    if not any(entry.rank is not None for entry in decisions.plan.parameters):
        del kinds["of a projected parameter"]
    return [
        GraphReport(f"{name}'s step {kind}", tuple(decisions.updates.pass_records(group, projected=projected)))
        for kind, projected in kinds.items()
    ]


def _graph_table(graphs: Sequence[GraphReport]) -> str:
    rows = []
    for report in graphs:
        rows.append((report.graph, "", "", "", ""))
        for record in report.passes:
            effect = record.effect
            idle = effect is not None and not effect.count
            what = "nothing to do" if effect is None or idle else f"{effect.count} {effect.what}"
            sized = effect is not None and not idle and effect.bytes_before is not None
            sizes = f"{format_bytes(effect.bytes_before)} -> {format_bytes(effect.bytes_after)}" if sized else ""  # type: ignore[union-attr, arg-type]
            nodes = f"{record.num_nodes_before} -> {record.num_nodes_after}"
            rows.append((f"  {record.name}", what, nodes, sizes, f"{1e3 * record.time_s:.0f}"))
    return tabulate(rows, headers=("graph and pass", "what it changed", "nodes", "bytes", "ms"), colalign=("left",) * 5)


def _parameter_table(plan: Plan) -> str:
    """Returns a row per group of parameters of equal shape and treatment whose names differ only in numbers."""
    groups: dict[tuple[Any, ...], list[ParameterPlan]] = {}
    for entry in plan.parameters:
        pattern, shared = _pattern(entry.name), tuple(map(_pattern, entry.shared_with))
        groups.setdefault((pattern, entry.shape, entry.rank, entry.dim, entry.reason, shared), []).append(entry)
    rows = []
    for (pattern, shape, rank, dim, reason, shared), entries in groups.items():
        kept = sum(sum(entry.bytes.values()) for entry in entries)
        treatment = "full rank" if rank is None else f"rank {rank}, {dim}"
        why = f"{reason}, shared with {', '.join(shared)}" if shared else reason
        rows.append((pattern, len(entries), "x".join(map(str, shape)), treatment, why, format_bytes(kept)))
    return tabulate(
        rows,
        headers=("parameter", "count", "shape", "trained at", "because", "bytes kept"),
        colalign=("left", "right", "left", "left", "left", "right"),
    )


def _head_table(heads: Mapping[str, tuple[HeadGroup, ...]]) -> str:
    """Returns a row per group of weights with equal heads whose names differ only in numbers."""
    counts: dict[tuple[str, ...], int] = {}
    for name, groups in heads.items():
        for group in groups:
            side = "columns" if group.role == "output" else "rows"
            shown = ", ".join(_span(head) for head in group.heads[:2]) + (", ..." if group.num_heads > 2 else "")
            row = (_pattern(name), group.role, f"{group.num_heads} of {group.head_size}", f"{side} {shown}")
            counts[row] = counts.get(row, 0) + 1
    if not counts:
        return "none recognised: every weight is projected as an ordinary matrix"
    rows = [(pattern, count, *rest) for (pattern, *rest), count in counts.items()]
    return tabulate(rows, headers=("weight", "count", "heads of", "number of size", "which (features)"))


def _span(features: Sequence[int]) -> str:
    is_row = list(features) == list(range(features[0], features[-1] + 1))
    return f"{features[0]}-{features[-1]}" if is_row else f"{len(features)} from {features[0]} on"


def _pattern(name: str) -> str:
    """Returns a parameter's name with a star for each number in its path."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
