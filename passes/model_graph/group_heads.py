"""Analysis: which rows of which weights form the heads of an attention, from a block's graph alone.

    linear -> view -> transpose -> rotary, norm, ...  -> q \\
    linear -> view -> transpose -> rotary, norm, ...  -> k  > attention -> transpose -> reshape -> linear
    linear -> view -> transpose                       -> v /

Every value carries, for each of its elements, the number of the feature it was made from (``FeatureLabels``): the
output feature of a linear, which is a row of its weight, or an element of an attention's heads. Operations that move
elements move their labels; elementwise ones unite them; reductions have none. Where the labels arrive at an attention
they say which rows make which head, and where those of its result arrive at a linear, which columns that reads. So
neither the names of modules nor the order of q, k and v in a fused weight matter.

Known attentions: scaled_dot_product_attention, ``softmax(Q K^T) V`` in products, torch's multi-head attention. What is
not found is projected as an ordinary matrix.
"""

import collections
import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from galore_fx.passes.model_graph.feature_labels import AttentionParts, FeatureLabels, Labelled
from galore_fx.passes.model_graph.find_linears import (
    LinearSite,
    attention_arguments,
    find_attention_weights,
    find_linears,
)

_ROLES = ("query", "key", "value")


@dataclasses.dataclass(frozen=True)
class HeadGroup:
    """The heads that one weight holds in one role.

    Attributes:
        placeholder: index of the weight among the graph's placeholders.
        role: "query", "key", "value": ``heads`` number output features; "output": input features.
        heads: the features of each head, in the order of the heads. Heads that are repeated for several queries
            (grouped keys and values) are listed once.
    """

    placeholder: int
    role: str
    heads: tuple[tuple[int, ...], ...]

    @property
    def num_heads(self) -> int:
        """How many."""
        return len(self.heads)

    @property
    def head_size(self) -> int:
        """Features of one head."""
        return len(self.heads[0])


def group_heads(gm: fx.GraphModule) -> list[HeadGroup]:
    """The heads in the weights of a graph, in the order of its attentions; by role in each."""
    numbers = {node: i for i, node in enumerate(n for n in gm.graph.nodes if n.op == "placeholder")}
    sites = find_linears(gm)
    labels = FeatureLabels({site.node: site for site in sites})
    found = _inside_multi_head_attention(gm, numbers)
    for node in gm.graph.nodes:
        parts = labels.visit(node)
        if parts is not None:
            found += _inputs_of(parts, numbers)
    for site in sites:
        group = _output(site, labels, numbers)
        if group is not None:
            found.append(group)
    # The same attention is met once for each of its users.
    return list(dict.fromkeys(found))


def shared_heads(
    groups: Sequence[HeadGroup], placeholder: int, roles: frozenset[str], rank: int
) -> tuple[tuple[int, ...], ...] | None:
    """The heads of a weight that may share a basis; None where it has none, or too few for the rank.

    Where queries, keys and values are one weight, a head is all rows of it that belong to a query head.

    Args:
        groups: what ``group_heads`` found.
        placeholder: the weight's.
        roles: those that are to share; a weight with one of them shares as a whole.
        rank: columns of the basis.
    """
    own = [group for group in groups if group.placeholder == placeholder and group.role != "output"]
    if not any(group.role in roles for group in own):
        return None
    if len({group.role for group in own}) != len(own):
        return None  # two attentions read it
    num_heads = max(group.num_heads for group in own)
    heads = []
    for index in range(num_heads):
        parts = (group.heads[index * group.num_heads // num_heads] for group in own)
        heads.append(tuple(feature for part in parts for feature in part))
    return tuple(heads) if rank <= num_heads * len(heads[0]) else None


def same_inputs(gm: fx.GraphModule) -> dict[int, list[int]]:
    """By the placeholder of each weight, those of all weights whose linears read the same values, itself included.

    A weight that several linears read, or torch's multi-head attention, is not among them.
    """
    numbers = {node: i for i, node in enumerate(n for n in gm.graph.nodes if n.op == "placeholder")}
    sites = find_linears(gm)
    uses = collections.Counter(site.weight for site in sites)
    single = [site for site in sites if uses[site.weight] == 1]
    return {
        numbers[site.weight]: [numbers[other.weight] for other in single if other.input is site.input]
        for site in single
    }


def _inputs_of(parts: AttentionParts, numbers: dict[fx.Node, int]) -> list[HeadGroup]:
    groups = []
    for role, value in zip(_ROLES, (parts.query, parts.key, parts.value), strict=True):
        source = _one_source(value)
        if value is None or source is None:
            continue
        heads = _heads_of(value.maps, parts.heads_apart)
        if heads is not None:
            groups.append(HeadGroup(numbers[source.weight], role, heads))
    return groups


def _one_source(value: Labelled | None) -> LinearSite | None:
    return value.source if value is not None and isinstance(value.source, LinearSite) else None


def _heads_of(maps: Sequence[Tensor], heads_apart: bool) -> tuple[tuple[int, ...], ...] | None:
    """The features of each head, of equal number; None where heads share some of them or are no heads at all."""
    flat = [_by_head(labels, heads_apart) for labels in maps]
    num_heads = {labels.shape[0] for labels in flat}
    if len(num_heads) != 1:
        return None
    heads = []
    for index in range(num_heads.pop()):
        features = torch.cat([labels[index].reshape(-1) for labels in flat])
        heads.append(tuple(torch.unique(features).tolist()))
    heads = list(dict.fromkeys(heads))
    sizes = {len(head) for head in heads}
    apart = len({feature for head in heads for feature in head}) == sum(map(len, heads))
    return tuple(heads) if len(sizes) == 1 and sizes != {0} and apart else None


def _by_head(labels: Tensor, heads_apart: bool) -> Tensor:
    """(heads, size) of one token of labels (..., heads, tokens, size) or (batch * heads, tokens, size)."""
    labels = labels[..., 0, :]
    while heads_apart and labels.ndim > 2:
        labels = labels[0]
    return labels


def _output(site: LinearSite, labels: FeatureLabels, numbers: dict[fx.Node, int]) -> HeadGroup | None:
    value = labels.of(site.input)
    if value is None or not isinstance(value.source, AttentionParts) or len(value.maps) != 1:
        return None
    features = value.maps[0]
    while features.ndim > 1:
        features = features[0]
    heads: dict[int, list[int]] = {}
    for column, element in enumerate(features.tolist()):
        heads.setdefault(element // value.source.head_size, []).append(column)
    sizes = {len(columns) for columns in heads.values()}
    if len(sizes) != 1:
        return None
    return HeadGroup(numbers[site.weight], "output", tuple(tuple(heads[head]) for head in sorted(heads)))


def _inside_multi_head_attention(gm: fx.GraphModule, numbers: dict[fx.Node, int]) -> list[HeadGroup]:
    """Inside torch's own function the heads are consecutive, in each of q, k and v."""
    groups = []
    for site in find_attention_weights(gm):
        given = attention_arguments(site.node)
        width, num_heads = int(given["embed_dim_to_check"]), int(given["num_heads"])
        size = width // num_heads
        heads = tuple(tuple(range(h * size, (h + 1) * size)) for h in range(num_heads))
        number = numbers[site.weight]
        if site.name == "in_proj_weight":
            for part, role in enumerate(_ROLES):
                moved = tuple(tuple(row + part * width for row in head) for head in heads)
                groups.append(HeadGroup(number, role, moved))
        else:
            role = {"q": "query", "k": "key", "v": "value", "o": "output"}[site.name[0]]
            groups.append(HeadGroup(number, role, heads))
    return groups
