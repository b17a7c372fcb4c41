"""Keeps a training call within the batch that its budget was planned for."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from galore_fx.errors import UsageError
from galore_fx.sample_check import call_arguments


class PlannedBatch:
    """Called with a training call's arguments, it refuses what the plan does not cover.

    Args:
        shapes: of the sample that the plan was made with, by argument.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Passes batches that are nowhere larger than the sample.

        Raises:
            UsageError: a tensor is larger than the sample's in some dimension, or the sample had none of that name.
        """
        for name, shape in shapes_of(args, kwargs).items():
            planned = self._shapes.get(name)
            smaller = planned is not None and len(planned) == len(shape)
            if not (smaller and all(size <= limit for size, limit in zip(shape, planned or (), strict=True))):
                was = "not in the sample" if planned is None else f"{planned} in the sample"
                raise UsageError(
                    f"{name} of shape {shape} was {was} that the budget was planned for; the peak could exceed it. "
                    "Give galore_fx.compile a sample with the largest shapes that you train with, or no budget"
                )


def sample_shapes(sample: object) -> dict[str, tuple[int, ...]]:
    """Shapes of a sample's tensors, by argument."""
    return shapes_of(*call_arguments(sample, lambda value: value))


def shapes_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a call, by argument."""
    named = {**{f"argument {i}": value for i, value in enumerate(args)}, **kwargs}
    return {name: tuple(value.shape) for name, value in named.items() if isinstance(value, Tensor)}
