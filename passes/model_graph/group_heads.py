"""Analysis: derives from a block's graph which rows of which weights form the heads of an attention.

    linear -> view -> transpose -> rotary, norm, ...  -> q \\
    linear -> view -> transpose -> rotary, norm, ...  -> k  > attention -> transpose -> reshape -> linear
    linear -> view -> transpose                       -> v /

Every element of a value carries as label the index of its source feature (``FeatureLabels``): an output feature of a
linear, which is a row of its weight, or an element of an attention's heads. Operations that move elements move the
labels, elementwise operations unite them, and reductions drop them. The labels that reach an attention show which rows
form each head. The labels of its result that reach a linear show which columns read each head. Neither module names nor
the order of q, k and v in a fused weight matter.

Recognised attentions: scaled_dot_product_attention, ``softmax(Q K^T) V`` as products, torch's multi-head attention.
Weights of any other attention are projected as ordinary matrices.
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
    """The heads of one weight in one role.

    Attributes:
        placeholder: index of the weight among the graph's placeholders.
        role: "query", "key" or "value", with output features in ``heads``; "output", with input features.
        heads: feature indices of each head, in the order of the heads. Keys and values that several queries share
            (grouped-query attention) are listed once.
    """

    placeholder: int
    role: str
    heads: tuple[tuple[int, ...], ...]

    @property
    def num_heads(self) -> int:
        """Number of heads."""
        return len(self.heads)

    @property
    def head_size(self) -> int:
        """Number of features per head."""
        return len(self.heads[0])


def group_heads(gm: fx.GraphModule) -> list[HeadGroup]:
    """Returns the head groups of a graph: torch's multi-head attentions, other inputs of attentions, then outputs."""
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
    # Several visits may yield the same group.
    return list(dict.fromkeys(found))


def shared_heads(
    groups: Sequence[HeadGroup], placeholder: int, roles: frozenset[str], rank: int
) -> tuple[tuple[int, ...], ...] | None:
    """Returns the heads of a weight that may share a basis; None if it has none, or too few features for the rank.

    In a fused weight of queries, keys and values, a head comprises all rows that belong to one query head.

    Args:
        groups: result of ``group_heads``.
        placeholder: index of the weight's placeholder.
        roles: roles that share a basis; a weight with one of them shares as a whole.
        rank: columns of the basis.
    """
    own = [group for group in groups if group.placeholder == placeholder and group.role != "output"]
    if not any(group.role in roles for group in own):
        return None
    if len({group.role for group in own}) != len(own):
        return None  # several attentions read the weight
    num_heads = max(group.num_heads for group in own)
    heads = []
    for index in range(num_heads):
        parts = (group.heads[index * group.num_heads // num_heads] for group in own)
        heads.append(tuple(feature for part in parts for feature in part))
    return tuple(heads) if rank <= num_heads * len(heads[0]) else None


def same_inputs(gm: fx.GraphModule) -> dict[int, list[int]]:
    """Maps each weight to all weights whose linears read the same input, itself included, by placeholder index.

    Omits weights that several linears use, and weights inside torch's multi-head attention.
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
    """Returns the features of each head; None if heads overlap or differ in size, or if there are no heads."""
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
    """Returns one token's labels (heads, size), from (..., heads, tokens, size) or (batch * heads, tokens, size)."""
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
    """Returns the head groups of torch's multi-head attention, whose heads are consecutive in each of q, k and v."""
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
