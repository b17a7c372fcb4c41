"""One basis for the weights of an attention that read the same input: who shares it, and what a graph then takes.

A weight is settled when its heads are first found, in a window in which it has no gradient yet: it takes the basis of
the first candidate, queries before others, or keeps its own for good. So no basis has an owner that has another owner.
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
    """Settles the weights whose heads have just been found.

    Args:
        new: their placeholders.
        records: of all parameters of the graph, by placeholder.
        same_inputs: the weights that read the same values, as ``group_heads.same_inputs`` finds them.
        heads: of the graph.
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
    """What a graph over these records takes for a weight: not a basis that it takes for another one already."""
    inputs = record.graph_inputs(form)
    if owner_place(record, records) is not None:
        inputs.pop("basis", None)
    return inputs


def owner_place(record: ProjectedParameter | None, records: Sequence[object]) -> int | None:
    """The place, among a graph's records, of the one whose basis a weight has; None where it has its own."""
    owner = None if record is None else record.basis_owner
    return None if owner is None else next((i for i, other in enumerate(records) if other is owner), None)


def _is_candidate(record: ProjectedParameter | None) -> bool:
    return record is not None and record.shares_basis and isinstance(record.source, HeadBasis | SharedBasis)
