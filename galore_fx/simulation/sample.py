"""Converts a sample, a batch as the model takes it, to arguments of the model's forward, and shortens it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from galore_fx.runtime.torch_private import tree_map


@dataclasses.dataclass(frozen=True)
class TrainingCall:
    """A sample with both positional arguments and keywords, as in a call of the model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def call_arguments(sample: object, convert: Callable[[Any], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns a sample as arguments and keywords of the model's forward, with ``convert`` applied to every leaf."""
    if isinstance(sample, TrainingCall):
        converted = tree_map(convert, list(sample.args))
        return tuple(converted), {key: tree_map(convert, value) for key, value in sample.kwargs.items()}
    if isinstance(sample, Mapping):
        return (), {key: tree_map(convert, value) for key, value in sample.items()}
    values = list(sample) if isinstance(sample, tuple | list) else [sample]
    return tuple(tree_map(convert, values)), {}


def describe_sample(sample: object) -> str:
    """Returns the dtypes and shapes of a sample as text, for messages."""
    args, kwargs = call_arguments(sample, _describe)
    return str(kwargs or list(args))


def _describe(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def batch_size(sample: object, dim: int) -> int:
    """Returns the number of sequences (dim 0) or tokens (dim 1) in the first tensor of a sample; 0 if it has none."""
    args, kwargs = call_arguments(sample, lambda value: value)
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    known = bool(tensors) and tensors[0].ndim > dim and (dim == 0 or not tensors[0].is_floating_point())
    return tensors[0].shape[dim] if known else 0


def shortened(sample: object, dim: int, size: int) -> object:
    """Cuts a sample to ``size`` sequences (dim 0) or tokens (dim 1), in every tensor that has as many as the first."""
    before = batch_size(sample, dim)

    def cut(value: Any) -> Any:
        fits = isinstance(value, Tensor) and value.ndim > dim and value.shape[dim] == before
        return value.narrow(dim, 0, size) if fits else value

    args, kwargs = call_arguments(sample, cut)
    return TrainingCall(args, kwargs)
