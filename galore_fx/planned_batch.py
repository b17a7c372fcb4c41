"""Keeps a training call within the batch that its budget was planned for."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from galore_fx.errors import UsageError
from galore_fx.sample import call_arguments

Shapes = dict[str, tuple[int, ...]]


class PlannedBatch:
    """Called with a training call's arguments, it refuses what the plan does not cover.

    Args:
        model: the model.
        shapes: of the sample that the plan was made with, by argument.
    """

    def __init__(self, model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._forward = type(model).forward
        self._shapes = shapes

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Passes batches that are nowhere larger than the sample.

        Raises:
            UsageError: a tensor is larger than the sample's in some dimension, or the sample had none of that name.
        """
        for name, shape in _shapes(self._forward, args, kwargs).items():
            planned = self._shapes.get(name)
            smaller = planned is not None and len(planned) == len(shape)
            if not (smaller and all(size <= limit for size, limit in zip(shape, planned or (), strict=True))):
                was = "not in the sample" if planned is None else f"{planned} in the sample"
                raise UsageError(
                    f"{name} of shape {shape} was {was} that the budget was planned for; the peak could exceed it. "
                    "Give galore_fx.compile a sample with the largest shapes that you train with, or no budget"
                )


def sample_shapes(model: nn.Module, sample: object) -> Shapes:
    """Shapes of a sample's tensors, by argument of the model's forward."""
    return _shapes(type(model).forward, *call_arguments(sample, lambda value: value))


def _shapes(forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Shapes:
    """By the names that the forward gives its arguments, however they are passed."""
    signature = inspect.signature(forward)
    try:
        bound = dict(signature.bind(None, *args, **kwargs).arguments)
    except TypeError:
        return {}  # the model will say what is wrong with the call
    named: dict[str, Any] = {}
    for name, value in list(bound.items())[1:]:
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            named |= {f"{name} {i}": each for i, each in enumerate(value)}
        else:
            named[name] = value
    return {name: tuple(value.shape) for name, value in named.items() if isinstance(value, Tensor)}
