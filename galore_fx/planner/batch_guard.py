"""Refuses training calls whose batch exceeds the one that the budget was planned for."""

import inspect
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from galore_fx.errors import UsageError
from galore_fx.plan_record import Plan
from galore_fx.simulation.sample import call_arguments
from galore_fx.units import format_bytes

Shapes = dict[str, tuple[int, ...]]
# Returns the plan of a step with these arguments, all other settings being as planned.
Replan = Callable[[tuple[Any, ...], dict[str, Any]], Plan]


class PlannedBatch:
    """Refuses training calls that would exceed the plan's budget.

    A tensor of at most one element passes, since it enlarges no step; transformers' Trainer passes the number of labels
    so. For any other argument that the sample lacks a step is simulated, with all arguments at their largest planned
    sizes. If that step fits, later calls may have the argument too.

    Args:
        model: the model.
        shapes: shapes of the planned sample's tensors, by argument.
        replan: simulates a step with other arguments.
    """

    def __init__(self, model: nn.Module, shapes: Mapping[str, tuple[int, ...]], replan: Replan) -> None:
        self._forward = type(model).forward
        self._shapes = dict(shapes)
        self._sampled = frozenset(shapes)
        self._replan = replan

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Checks the arguments of a training call.

        Raises:
            UsageError: a tensor is larger than the sample's in some dimension, or a step with an argument that the
                sample lacks would exceed the budget.
            ModelError: a step with such an argument cannot be simulated.
        """
        shapes = {n: shape for n, shape in _shapes(self._forward, args, kwargs).items() if math.prod(shape) > 1}
        larger = {name: shape for name, shape in shapes.items() if not _within(shape, self._shapes.get(name))}
        for name, shape in larger.items():
            if name in self._sampled:
                planned = self._shapes[name]
                raise UsageError(
                    f"{name} of shape {shape} was {planned} in the sample that the budget was planned for; the peak "
                    "could exceed it. Give galore_fx.compile a sample with the largest shapes that you train with, or "
                    "no budget"
                )
        if larger:
            grown = _growth({n: shapes[n] for n in shapes if n in self._sampled}, self._shapes)
            new = {name: tuple(grown.get(size, size) for size in shape) for name, shape in larger.items()}
            plan = self._replan(*_of_shapes(self._forward, args, kwargs, {**self._shapes, **new}))
            if not plan.within_budget:
                given = ", ".join(f"{name} of shape {shape}" for name, shape in larger.items())
                raise UsageError(
                    f"{given} was not in the sample that the budget was planned for, and with it a step takes "
                    f"{format_bytes(plan.peak_bytes)} of the {format_bytes(plan.budget_bytes or 0)}. Give "
                    "galore_fx.compile a sample with it, or no budget"
                )
            self._shapes |= new


def _within(shape: tuple[int, ...], planned: tuple[int, ...] | None) -> bool:
    return planned is not None and len(planned) == len(shape) and all(map(operator.le, shape, planned))


def _growth(shapes: Shapes, planned: Shapes) -> dict[int, int]:
    """Maps each size in this batch to the largest planned one, according to the arguments that the sample had."""
    found: dict[int, int] = {}
    for name, shape in shapes.items():
        for size, limit in zip(shape, planned[name], strict=True):
            found[size] = max(limit, found.get(size, size))
    return found


def _of_shapes(
    forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Shapes
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the call with meta tensors of the given shapes, by argument; a tensor passed twice stays one tensor."""
    bound = inspect.signature(forward).bind(None, *args, **kwargs)
    made: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    def resized(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or name not in shapes:
            return value
        key = (id(value), shapes[name])
        if key not in made:
            made[key] = torch.empty(shapes[name], dtype=value.dtype, device="meta")
        return made[key]

    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            bound.arguments[name] = {key: resized(key, each) for key, each in value.items()}
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            bound.arguments[name] = tuple(resized(f"{name} {i}", each) for i, each in enumerate(value))
        else:
            bound.arguments[name] = resized(name, value)
    return bound.args[1:], dict(bound.kwargs)


def sample_shapes(model: nn.Module, sample: object) -> Shapes:
    """Returns the shapes of a sample's tensors, by argument of the model's forward."""
    return _shapes(type(model).forward, *call_arguments(sample, lambda value: value))


def _shapes(forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Shapes:
    """Returns tensor shapes by the forward's argument names, however passed; none if the call does not match."""
    signature = inspect.signature(forward)
    try:
        bound = dict(signature.bind(None, *args, **kwargs).arguments)
    except TypeError:
        return {}  # the model itself raises the error of this call
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
