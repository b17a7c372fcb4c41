"""Traces the output features of linears and the elements of attention heads through a block's graph.

    a linear's output (b, t, out)         labels 0 ... out - 1, equal for all tokens
    view, transpose, split, index, ...    labels move with the elements
    cat, stack                            labels are joined
    mul, add, norm, dtype, dropout        union of the labels of all labelled operands
    sum, mean, ...                        no labels
    matmul of two labelled values         scores; softmax keeps them; times a third value: an attention

Labels are expanded over batch and sequence without storage (``expand``), so a label map is as small as one token.
"""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from galore_fx.passes.model_graph.find_linears import LinearSite

_SDPA = torch.nn.functional.scaled_dot_product_attention
# Methods and functions that only move elements; they are applied to the labels.
_MOVES = {
    *("view", "reshape", "transpose", "permute", "contiguous", "unsqueeze", "squeeze", "expand", "split", "chunk"),
    *("unbind", "flatten", "unflatten", "select", "narrow", "swapaxes", "movedim", "clone", "repeat_interleave"),
    *("broadcast_to", "repeat", "getitem", "t", "tensor_split"),
}
_JOINS = {"cat", "concat", "stack"}
# Operations that mix elements of a vector only through a common factor, or not at all.
_ELEMENTWISE = {
    *("mul", "add", "sub", "neg", "div", "truediv", "imul", "iadd", "isub", "itruediv", "to", "float", "type_as"),
    *("half", "bfloat16", "type", "dropout", "layer_norm", "rms_norm", "add_", "mul_", "div_", "tanh", "clamp"),
    *("masked_fill", "masked_fill_", "where", "softmax", "rsub", "max", "nan_to_num", "detach"),
}
_PRODUCTS = {"matmul", "bmm", "baddbmm"}
_IN_PLACE_OF_VIEW = {"view": "reshape"}


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionParts:
    """The labels of one attention.

    Attributes:
        query: labels of the queries, None for unlabelled ones.
        key: labels of the keys, likewise.
        value: labels of the values, likewise.
        heads_apart: whether the heads have their own dimension, instead of one shared with the batch.
        head_size: number of elements per head of the result.
    """

    query: "Labelled | None"
    key: "Labelled | None"
    value: "Labelled | None"
    heads_apart: bool
    head_size: int


@dataclasses.dataclass(frozen=True, eq=False)
class Labelled:
    """The origin of the elements of a value.

    Attributes:
        source: the labels index the output features of this linear, or the elements of this attention's heads.
        maps: label tensors with the shape of the value, int32; several if elements derive from several features.
    """

    source: LinearSite | AttentionParts
    maps: tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class _Scores:
    """A product ``Q K^T``, possibly scaled, masked or normalised."""

    query: Labelled
    key: Labelled


class FeatureLabels:
    """Labels the values of one graph; call ``visit`` on its nodes in order.

    Args:
        linears: the products of an activation and a weight, by node.
    """

    def __init__(self, linears: dict[fx.Node, LinearSite]) -> None:
        self._linears = linears
        self._values: dict[fx.Node, Any] = {}

    def of(self, node: fx.Node) -> Labelled | None:
        """Returns the labels of a node's value, None for an unlabelled one."""
        value = self._values.get(node)
        return value if isinstance(value, Labelled) else None

    def visit(self, node: fx.Node) -> AttentionParts | None:
        """Labels a node; returns the attention if the node completes one, else None."""
        if node.op not in ("call_function", "call_method"):
            return None
        shape = _shape(node)
        site = self._linears.get(node)
        if site is not None:
            if shape is not None:
                self._values[node] = Labelled(site, (_numbered(shape, 1),))
            return None
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node.target is _SDPA:
            return self._attend(node, shape, *(self._argument(node, i, n) for i, n in enumerate(_QKV)))
        if name in _PRODUCTS:
            return self._multiply(node, shape, name)
        if name in _JOINS:
            self._values[node] = self._join(node, name)
        elif node.target is operator.getitem and isinstance(self._values.get(node.args[0]), tuple):  # type: ignore[arg-type]
            self._values[node] = self._values[node.args[0]][node.args[1]]  # type: ignore[index]
        elif name in _MOVES:
            self._values[node] = self._move(node, name)
        elif name in _ELEMENTWISE and shape is not None:
            self._values[node] = self._unite(node, shape)
        return None

    def _argument(self, node: fx.Node, position: int, name: str) -> Any:
        argument = node.args[position] if position < len(node.args) else node.kwargs.get(name)
        return self._values.get(argument) if isinstance(argument, fx.Node) else None

    def _move(self, node: fx.Node, name: str) -> Any:
        moved, *others = node.args
        value = self._values.get(moved) if isinstance(moved, fx.Node) else None
        if not isinstance(value, Labelled):
            # A view of scores remains scores.
            return value if isinstance(value, _Scores) and name != "getitem" else None
        function = _function(node, name)
        try:
            arguments, keywords = fx.map_arg(tuple(others), _concrete), fx.map_arg(dict(node.kwargs), _concrete)
            results = [function(labels, *arguments, **keywords) for labels in value.maps]
        except (RuntimeError, TypeError, IndexError, ValueError):
            return None  # depends on a value that is unknown here
        if isinstance(results[0], Tensor):
            return Labelled(value.source, tuple(results))
        return tuple(Labelled(value.source, tuple(maps)) for maps in zip(*results, strict=True))

    def _join(self, node: fx.Node, name: str) -> Labelled | None:
        joined: Any = node.args[0] if node.args else node.kwargs.get("tensors")
        joined = [part for part in joined if not _is_empty(part)]  # an empty key-value cache
        values = [value for value in map(self._values.get, joined) if isinstance(value, Labelled)]
        if not values or len(values) != len(joined) or any(value.source is not values[0].source for value in values):
            return None
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        number = max(len(value.maps) for value in values)
        join = torch.stack if name == "stack" else torch.cat
        maps = [_small(join, [value.maps[i % len(value.maps)] for value in values], dim) for i in range(number)]
        return Labelled(values[0].source, tuple(maps))

    def _unite(self, node: fx.Node, shape: Sequence[int]) -> Any:
        found = [self._values.get(argument) for argument in node.all_input_nodes]
        scores = [value for value in found if isinstance(value, _Scores)]
        if scores:
            return scores[0]
        labelled = [value for value in found if isinstance(value, Labelled)]
        if not labelled or any(value.source is not labelled[0].source for value in labelled):
            # Values with several sources, as after a residual connection, get no labels.
            return None
        try:
            maps = [labels.expand(shape) for value in labelled for labels in value.maps]
        except RuntimeError:
            return None
        return Labelled(labelled[0].source, tuple(_distinct(maps)))

    def _multiply(self, node: fx.Node, shape: Sequence[int] | None, name: str) -> AttentionParts | None:
        factors = node.args[1:] if name == "baddbmm" else node.args
        operands = [*factors, *node.kwargs.values()]
        left, right = [self._values.get(n) if isinstance(n, fx.Node) else None for n in (*operands, None, None)[:2]]
        if isinstance(left, _Scores) and isinstance(right, Labelled):
            return self._attend(node, shape, left.query, left.key, right)
        if isinstance(left, Labelled) and isinstance(right, Labelled):
            self._values[node] = _Scores(left, _transposed(right))
        return None

    def _attend(
        self, node: fx.Node, shape: Sequence[int] | None, query: Any, key: Any, value: Any
    ) -> AttentionParts | None:
        if shape is None or len(shape) < 3:
            return None
        query, key, value = (each if isinstance(each, Labelled) else None for each in (query, key, value))
        parts = AttentionParts(query, key, value, len(shape) > 3, shape[-1])
        self._values[node] = Labelled(parts, (_numbered(shape, 3),))
        return parts


_QKV = ("query", "key", "value")


def _function(node: fx.Node, name: str) -> Callable[..., Any]:
    """Returns a function that moves labels as the node moves elements; views become reshapes, which may copy."""
    if name == "getitem":
        return operator.getitem
    if name in ("contiguous", "clone"):
        return lambda labels, *_args, **_kwargs: labels
    name = _IN_PLACE_OF_VIEW.get(name, name)
    if node.op == "call_method":
        return lambda labels, *args, **kwargs: getattr(labels, name)(*args, **kwargs)
    function: Callable[..., Any] = node.target  # type: ignore[assignment]
    return function


def _numbered(shape: Sequence[int], kind: int) -> Tensor:
    """Returns labels by the last dimension (``kind`` 1), or by the third last and the last (3), expanded elsewhere."""
    if kind == 1:
        return torch.arange(shape[-1], dtype=torch.int32).expand(tuple(shape))
    heads = torch.arange(shape[-3] * shape[-1], dtype=torch.int32).view(shape[-3], 1, shape[-1])
    return heads.expand(tuple(shape))


def _small(join: Callable[..., Tensor], parts: Sequence[Tensor], dim: Any) -> Tensor:
    """Joins labels without materialising expanded dimensions."""
    shape = join([part.to("meta") for part in parts], dim).shape
    if join is torch.stack:
        dim = dim % (parts[0].ndim + 1)
        parts, join = [part.unsqueeze(dim) for part in parts], torch.cat
    dim = dim % parts[0].ndim
    for other in range(parts[0].ndim):
        if other != dim and all(part.stride(other) == 0 or part.shape[other] == 1 for part in parts):
            parts = [part.narrow(other, 0, 1) for part in parts]
    return join(list(parts), dim).expand(shape)


def _transposed(value: Labelled) -> Labelled:
    """Returns the keys before their transposition for the product."""
    return Labelled(value.source, tuple(labels.transpose(-1, -2) for labels in value.maps))


def _distinct(maps: Sequence[Tensor]) -> list[Tensor]:
    kept: list[Tensor] = []
    for labels in maps:
        same = ((labels.data_ptr(), labels.stride()) == (other.data_ptr(), other.stride()) for other in kept)
        if not any(same):
            kept.append(labels)
    return kept


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    value = node.meta.get("example_value")
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else None


def _is_empty(node: fx.Node) -> bool:
    """Returns whether a node is known to be a tensor without elements."""
    return 0 in (_shape(node) or ())


def _concrete(node: fx.Node) -> Any:
    """Returns the number or numbers of a size argument; raises TypeError for any other node."""
    value = node.meta.get("example_value")
    if isinstance(value, torch.SymInt | int):
        return int(value)
    if isinstance(value, torch.Size | tuple | list) and not isinstance(value, Tensor):
        return tuple(int(size) for size in value)
    raise TypeError(f"{node} is no size")
