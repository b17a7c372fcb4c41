"""Shares one basis among the weights of an attention that read the same input, and lists a graph's inputs accordingly.

Each weight is decided once, when its heads are first recognised, in a window in which it has no gradient yet. It takes
the basis of the first candidate, queries first, or keeps its own for good. An owner thus never uses the basis of
another weight.
"""

import warnings
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from galore_fx.passes.model_graph.group_heads import HeadGroup
from galore_fx.runtime.subspace.basis_heads import HeadBasis
from galore_fx.runtime.subspace.basis_source import SharedBasis
from galore_fx.runtime.subspace.projected_parameter import GradientForm, ProjectedParameter

Records = Mapping[int, ProjectedParameter | None]


def share_bases(
    new: Collection[int], records: Records, same_inputs: Mapping[int, Sequence[int]], heads: Sequence[HeadGroup]
) -> None:
    """Decides which of the weights with newly recognised heads use the basis of another weight.

    Args:
        new: placeholder indices of these weights.
        records: records of all parameters of the graph, by placeholder index; None if not projected.
        same_inputs: result of ``group_heads.same_inputs``.
        heads: the head groups of the graph.
    """
    queries = {group.placeholder for group in heads if group.role == "query"}
    for placeholder in new:
        record = records[placeholder]
        if record is None or not record.shares_basis:
            continue
        first = min(
            (other for other in same_inputs.get(placeholder, ()) if _is_candidate(records[other])),
            key=lambda other: (other not in queries, other),
            default=placeholder,
        )
        owner = records[first]
        assert owner is not None
        owner = owner.basis_owner or owner
        if owner is record:
            continue
        if owner.basis.shape == record.basis.shape:
            record.share_basis(owner)
        else:
            warnings.warn(
                f"{record.name} has a basis of {tuple(record.basis.shape)} and cannot share that of {owner.name}, "
                f"{tuple(owner.basis.shape)}; give rank as an int for one rank in both",
                stacklevel=2,
            )


def weight_inputs(record: ProjectedParameter, form: GradientForm, records: Sequence[object]) -> dict[str, Tensor]:
    """Returns the inputs of a graph over these records for one weight, without a basis that its owner provides."""
    inputs = record.graph_inputs(form)
    if owner_place(record, records) is not None:
        inputs.pop("basis", None)
    return inputs


def owner_place(record: ProjectedParameter | None, records: Sequence[object]) -> int | None:
    """Returns the index of a weight's basis owner among a graph's records; None without an owner there."""
    owner = None if record is None else record.basis_owner
    return None if owner is None else next((i for i, other in enumerate(records) if other is owner), None)


def _is_candidate(record: ProjectedParameter | None) -> bool:
    return record is not None and record.shares_basis and isinstance(record.source, HeadBasis | SharedBasis)
