"""Traces one step of a ``torch.optim`` class on one parameter into a functional ATen graph.

    inputs    weight, grad, one per state tensor, one per scalar (hyper-parameters and scalar state)
    outputs   new weight, new state tensors, new scalar state

Every float of the param group (lr, betas, eps, weight_decay, ...) and every scalar of the state (step, mu_product) is a
SymFloat during the trace, so that the graph computes with live values. A branch of the optimizer on such a number
(``weight_decay != 0``) adds a guard; the other outcome needs another trace.
"""

import collections
import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic

from galore_fx.errors import OptimizerError
from galore_fx.runtime.formats.state_format import StateFormat
from galore_fx.runtime.torch_private import FakeTensorMode, ShapeEnv, condition_of, optimizer_internals

STATE_PREFIX = "state."
WHAT_CAN_BE_LOWERED = (
    "Of torch.optim, AdamW, Adam, SGD, RMSprop, NAdam, RAdam, Adagrad, Adamax, Adadelta can be lowered; a class of "
    "your own can if it treats all elements of a parameter alike and adds its update to the weight, as they do"
)
_SWITCHES = {"foreach": False, "fused": False, "capturable": False, "differentiable": False}
_SHAPE = (3, 2)


@dataclasses.dataclass(frozen=True)
class StateLayout:
    """State that an optimizer class keeps per parameter.

    Attributes:
        initial: fill value of each state tensor before the first step, by name; None if the first step creates it.
        scalars: initial value of each scalar state, by name.
        format: storage format of the tensors.
    """

    initial: Mapping[str, float | None]
    scalars: Mapping[str, float]
    format: StateFormat = StateFormat()


@dataclasses.dataclass(frozen=True)
class TracedStep:
    """One traced step.

    Attributes:
        gm: the graph; placeholders ``weight``, ``grad``, the names of ``tensors``, the names of ``scalars``.
        tensors: names of the input state tensors.
        new_tensors: names of the output state tensors, in the order of the outputs after the weight.
        scalars: names of the scalar inputs: ``lr``, ``betas.0``, ``state.step``, ...
        new_scalars: names of the scalar states, which are the last outputs, without prefix.
        first: whether this is a parameter's first step, which creates missing states.
        guards: conditions on the scalars, as sympy expressions, under which this graph is valid.
        holds_for: returns whether all guards hold for the values of ``scalars``, given in order.
    """

    gm: fx.GraphModule
    tensors: tuple[str, ...]
    new_tensors: tuple[str, ...]
    scalars: tuple[str, ...]
    new_scalars: tuple[str, ...]
    first: bool
    guards: tuple[sympy.Basic, ...]
    holds_for: Callable[[tuple[float, ...]], bool]


@dataclasses.dataclass(frozen=True)
class GroupSettings:
    """A param group, read once per step and split into live numbers and constants of the graph.

    Attributes:
        floats: live numbers by name, entries of tuples as ``name.index``.
        switches: all other settings, sorted by name; they are constants of a graph.
    """

    floats: Mapping[str, float]
    switches: tuple[tuple[str, Any], ...]

    @classmethod
    def read(cls, group: Mapping[str, Any]) -> "GroupSettings":
        """Reads the current settings of a group."""
        return cls(group_floats(group), group_switches(group))


def group_floats(group: Mapping[str, Any]) -> dict[str, float]:
    """Returns the live numbers of a param group by name, entries of tuples as ``name.index``."""
    floats: dict[str, float] = {}
    for key, value in group.items():
        if _is_number(value) or (isinstance(value, Tensor) and value.ndim == 0):
            floats[key] = float(value)
        elif isinstance(value, tuple) and value and all(_is_number(entry) for entry in value):
            floats |= {f"{key}.{i}": float(entry) for i, entry in enumerate(value)}
    return floats


def group_switches(group: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Returns the settings of a param group that are constants of a graph: all that are not numbers, sorted by name."""
    floats = group_floats(group)
    names = [
        key for key in group if key not in ("params", "param_names") and key not in floats and f"{key}.0" not in floats
    ]
    return tuple((name, group[name]) for name in sorted(names))


def state_layout(optimizer_class: type[torch.optim.Optimizer], group: Mapping[str, Any]) -> StateLayout:
    """Returns the state that the class keeps per parameter, observed on a step of a small parameter.

    Raises:
        OptimizerError: a state is neither a number nor a tensor of the parameter's shape, or the class has no
            ``_init_group``.
    """
    optimizer, parameter = _dummy(optimizer_class, group)
    _initialise(optimizer)
    before = copy.deepcopy(dict(optimizer.state[parameter]))
    optimizer.step()
    initial: dict[str, float | None] = {}
    scalars: dict[str, float] = {}
    for name, value in optimizer.state[parameter].items():
        first = before.get(name)
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            initial[name] = None if first is None else float(first.flatten()[0])
        elif isinstance(value, Tensor) and value.ndim == 0 or _is_number(value):
            scalars[name] = float(first if first is not None else 0.0)
        elif value is not None:
            raise OptimizerError(
                f"{optimizer_class.__name__} keeps {name!r} as {_describe(value)}; only numbers and tensors of the "
                f"parameter's shape can be kept in a subspace. {WHAT_CAN_BE_LOWERED}"
            )
    return StateLayout(initial, scalars)


def trace_step(
    optimizer_class: type[torch.optim.Optimizer],
    group: Mapping[str, Any],
    layout: StateLayout,
    scalars: Mapping[str, float],
    *,
    first: bool,
) -> TracedStep:
    """Traces one step.

    Args:
        optimizer_class: any class of ``torch.optim`` that treats the elements of a parameter alike.
        group: a param group of the class; its floats become symbols, its other settings constants.
        layout: its state, from ``state_layout``.
        scalars: current value of every float of the group and every scalar state (prefix ``state.``); they decide
            which branches are traced.
        first: whether the states that the first step creates are still missing.

    Raises:
        OptimizerError: the step cannot be traced; the message names the class and the cause.
    """
    optimizer, parameter = _dummy(optimizer_class, group)
    shape_env = ShapeEnv()
    fake_mode = FakeTensorMode(shape_env=shape_env)
    symbols: dict[str, sympy.Symbol] = {}
    values: dict[str, Any] = {}
    for name, value in scalars.items():
        source = ConstantSource(name)
        symbol = shape_env.create_unspecified_symbol(value, source=source, dynamic_dim=DimDynamic.DYNAMIC)
        symbols[name] = symbol
        values[name] = shape_env.create_symfloatnode(symbol, hint=value, source=source)
    tensors = tuple(name for name, value in layout.initial.items() if not (first and value is None))
    new_tensors, new_scalars = tuple(layout.initial), tuple(layout.scalars)
    names = tuple(scalars)

    def step(weight: Tensor, grad: Tensor, states: list[Tensor], floats: list[Any]) -> Any:
        live = dict(zip(names, floats, strict=True))
        traced = object.__new__(optimizer_class)
        traced.__dict__.update(optimizer_internals(optimizer))
        traced.param_groups = [{**_with_floats(optimizer.param_groups[0], live), "params": [weight]}]
        cells = {name: _ScalarCell(live[STATE_PREFIX + name]) for name in new_scalars}
        traced.state = collections.defaultdict(dict)
        state = traced.state[weight]
        state.update(cells)
        state.update(zip(tensors, states, strict=True))
        weight.grad = grad
        traced.step()
        return weight, [state[name] for name in new_tensors], [_value_of(state[name]) for name in new_scalars]

    fake = fake_mode.from_tensor(parameter.detach().clone())
    states = [fake_mode.from_tensor(torch.zeros(_SHAPE)) for _ in tensors]
    functional = torch.func.functionalize(step, remove="mutations_and_views")
    try:
        with torch.no_grad():
            gm = make_fx(functional, tracing_mode="real")(
                fake, fake_mode.from_tensor(torch.zeros(_SHAPE)), states, list(values.values())
            )
    except Exception as error:
        raise OptimizerError(
            f"a step of {optimizer_class.__name__} cannot be traced ({error}). {WHAT_CAN_BE_LOWERED}"
        ) from error
    _name_placeholders(gm, ("weight", "grad", *tensors, *names))
    guards = tuple(guard.expr for guard in shape_env.guards)
    check = condition_of(guards, [symbols[name] for name in names])
    return TracedStep(_drop_bookkeeping(gm), tensors, new_tensors, names, new_scalars, first, guards, check)


class _ScalarCell(torch.Tensor):
    """A scalar state that holds a SymFloat where the optimizer expects a 0-d tensor."""

    value: Any

    @staticmethod
    def __new__(cls, value: Any) -> "_ScalarCell":
        return torch.Tensor._make_subclass(cls, torch.empty((), device="meta"))

    def __init__(self, value: Any) -> None:
        self.value = value

    def item(self) -> Any:
        return self.value

    def __iadd__(self, other: Any) -> Any:
        self.value = self.value + other
        return self

    def __imul__(self, other: Any) -> Any:
        self.value = self.value * other
        return self

    def __add__(self, other: Any) -> Any:
        return self.value + other

    def __mul__(self, other: Any) -> Any:
        return self.value * other

    def __sub__(self, other: Any) -> Any:
        return self.value - other

    def __rsub__(self, other: Any) -> Any:
        return other - self.value

    def __rpow__(self, other: Any) -> Any:
        return other**self.value

    __radd__ = __add__
    __rmul__ = __mul__


def _dummy(
    optimizer_class: type[torch.optim.Optimizer], group: Mapping[str, Any]
) -> tuple[torch.optim.Optimizer, torch.nn.Parameter]:
    parameter = torch.nn.Parameter(torch.ones(_SHAPE))
    parameter.grad = torch.ones(_SHAPE)
    settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    # Some classes fill their state in the constructor (Adagrad), so it is called with the group's settings.
    accepted = inspect.signature(optimizer_class).parameters
    optimizer = optimizer_class([parameter], **{k: v for k, v in settings.items() if k in accepted})
    optimizer.param_groups[0].update({**settings, **{k: v for k, v in _SWITCHES.items() if k in settings}})
    return optimizer, parameter


def _initialise(optimizer: torch.optim.Optimizer) -> None:
    """Creates the lazy state of the class through ``_init_group``, which every class of ``torch.optim`` has."""
    initialise = getattr(optimizer, "_init_group", None)
    if initialise is None:
        raise OptimizerError(
            f"{type(optimizer).__name__} is not built like the classes of torch.optim that can be lowered "
            f"(it has no _init_group). {WHAT_CAN_BE_LOWERED}"
        )
    num_lists = len(inspect.signature(initialise).parameters) - 1
    initialise(optimizer.param_groups[0], *([] for _ in range(num_lists)))


def _with_floats(group: Mapping[str, Any], floats: Mapping[str, Any]) -> dict[str, Any]:
    replaced = dict(group)
    for key, value in group.items():
        if key in floats:
            replaced[key] = floats[key]
        elif isinstance(value, tuple) and f"{key}.0" in floats:
            replaced[key] = tuple(floats[f"{key}.{i}"] for i in range(len(value)))
    return replaced


def _name_placeholders(gm: fx.GraphModule, names: tuple[str, ...]) -> None:
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    assert len(placeholders) == len(names), (placeholders, names)
    for node, name in zip(placeholders, names, strict=True):
        node.meta["galore_fx"] = {"input": name}


def _drop_bookkeeping(gm: fx.GraphModule) -> fx.GraphModule:
    """Removes profiler marks, the empty tensors of the scalar cells and the copies back into the inputs."""
    for node in reversed(list(gm.graph.nodes)):
        target = str(node.target)
        dead_copy = target.startswith("aten.copy_") and not node.users
        if node.op == "call_function" and (dead_copy or target.startswith("profiler.")):
            gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _value_of(state: Any) -> Any:
    return state.value if isinstance(state, _ScalarCell) else state


def _describe(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
