"""Builds a directed graph of a model's structure: blocks, parameters, heads, sharing, and treatment.

model ──has──> block ──has──> parameter ──has──> heads
  └────has──> parameter        │  └──uses basis of──> parameter
                               └──is also──> name
"""

from collections.abc import Mapping, Sequence

import networkx

from galore_fx.passes.model_graph.group_heads import HeadGroup
from galore_fx.plan_record import Plan


def structure_graph(
    title: str, plan: Plan, heads: Mapping[str, Sequence[HeadGroup]], basis_owners: Mapping[str, str]
) -> "networkx.DiGraph[str]":
    """Returns the graph of a planned model. Every attribute is text or a number, so it can be written as GraphML.

    Args:
        title: name of the model's class, which also names the model's node.
        plan: the plan of the model.
        heads: the attention heads of projected weights, by the weight's name.
        basis_owners: maps each weight that uses another weight's basis to the other's name.

    Returns:
        Nodes have a ``kind``: "model", "block", "parameter", "heads" or "name" (another name of a shared parameter).
        Parameters have ``shape``, ``elements``, ``treatment`` ("projected" or "full rank"), ``rank`` and ``dim`` (0 and
        "" at full rank), ``role``, ``weight_bits`` (0 in their own dtype), and bytes by category (``bytes_weights``,
        ``bytes_bases``, ...). Their block, or the model for parameters outside all blocks, has the sums of these bytes.
        Heads have ``role``, ``number`` and ``size`` (features of one head). Edges have a ``relation``: "has",
        "is also", "uses basis of".
    """
    graph: networkx.DiGraph[str] = networkx.DiGraph(recipe=plan.recipe.name, optimizer=plan.optimizer)
    graph.add_node(title, kind="model")
    blocks = {index: name or title for index, name in enumerate(plan.regions)}
    for name in filter(title.__ne__, blocks.values()):
        graph.add_edge(title, name, relation="has")
        graph.nodes[name]["kind"] = "block"
    for entry in plan.parameters:
        num_elements = 1
        for size in entry.shape:
            num_elements *= size
        owner = blocks[entry.region] if entry.region is not None else _block_of(entry.name, plan.regions) or title
        sizes = {f"bytes_{category}": size for category, size in entry.bytes.items()}
        graph.add_node(
            entry.name,
            kind="parameter",
            shape="x".join(map(str, entry.shape)),
            elements=num_elements,
            treatment="full rank" if entry.rank is None else "projected",
            rank=entry.rank or 0,
            dim=entry.dim or "",
            role=entry.reason,
            weight_bits=entry.weight_bits or 0,
            **sizes,
        )
        graph.add_edge(owner, entry.name, relation="has")
        for category, size in sizes.items():
            graph.nodes[owner][category] = graph.nodes[owner].get(category, 0) + size
        for other in entry.shared_with:
            graph.add_node(other, kind="name")
            graph.add_edge(entry.name, other, relation="is also")
        for group in heads.get(entry.name, ()):
            node = f"{entry.name}: {group.role} heads"
            graph.add_node(node, kind="heads", role=group.role, number=group.num_heads, size=group.head_size)
            graph.add_edge(entry.name, node, relation="has")
    for name, owner in basis_owners.items():
        graph.add_edge(name, owner, relation="uses basis of")
    return graph


def _block_of(parameter: str, blocks: Sequence[str]) -> str | None:
    return next((block for block in blocks if block and parameter.startswith(f"{block}.")), None)
