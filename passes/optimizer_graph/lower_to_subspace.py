"""Lowers a traced optimizer step into the subspace of its parameter.

Each value of the traced graph gets one of three labels:

    SCALAR   a number: hyper-parameters, step counts, bias corrections
    LOW      shaped like the projected gradient R: the gradient, the state, every tensor that the state depends on
    FULL     shaped like the weight

and the graph is rebuilt as two:

    prologue   scalars -> the numbers the tensors need, on the host, in double precision
    body       R, state, those numbers -> the low-rank update L and the new state

For AdamW, with ``c`` and ``L`` as below, one matrix product remains for the weight:

    traced     W1 = W * (1 - lr wd);  W2 = W1 + (-step_size) * m / d
    lowered    c = 1 - lr wd;         L = scale * (-step_size) * m / d;     W <- c W + back_project(L)

The edge LOW -> FULL disappears: back-projection is linear, so a FULL value is kept as the pair (c, L) as long as the
optimizer only scales it and adds to it. An edge FULL -> LOW (Adam's L2 decay: ``grad + wd * W`` feeds the state) takes
the projected weight: project(c W + back_project(L)) = c * project(W) + scale * L.

For an unprojected parameter the same code treats the weight as a LOW value; the body then updates the weight too.
"""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from galore_fx.errors import OptimizerError
from galore_fx.passes.optimizer_graph.trace_step import WHAT_CAN_BE_LOWERED, TracedStep

SCALE = "galore_scale"


@dataclasses.dataclass(frozen=True)
class LoweredStep:
    """A step, split into prologue and body.

    Attributes:
        prologue: scalars -> (numbers of the body, ..., weight factor ``c``, new scalar states, ...).
        body: (weight if unprojected, grad, state tensors, ..., projected weight if ``needs_weight``, numbers as a
            1-D tensor) -> (L, or the new weight if unprojected, new state tensors, ...). Works on any shape.
        inputs: names of the body's tensors before the numbers, in order.
        scalars: names of the prologue's inputs, in order.
        num_slots: length of the body's 1-D tensor of numbers.
    """

    prologue: fx.GraphModule
    body: fx.GraphModule
    inputs: tuple[str, ...]
    scalars: tuple[str, ...]
    num_slots: int

    @property
    def needs_weight(self) -> bool:
        """Whether the body takes the projected weight."""
        return "projected_weight" in self.inputs


def lower_to_subspace(step: TracedStep, *, projected: bool) -> LoweredStep:
    """Splits a traced step into prologue and body; the body of a projected parameter works in the subspace.

    Raises:
        OptimizerError: an operation is not elementwise or does more to the weight than scale and add (the message
            names it), or the step does not depend on the gradient.
    """
    return _Lowering(step, projected).run()


@dataclasses.dataclass(frozen=True)
class _Scalar:
    value: fx.Node | float


@dataclasses.dataclass(frozen=True)
class _Low:
    node: fx.Node


@dataclasses.dataclass(frozen=True)
class _Full:
    """``factor * W + back_project(update)``; the update is not yet multiplied by the scale."""

    factor: _Scalar
    update: _Low | None


_Value = _Scalar | _Low | _Full


class _Lowering:
    def __init__(self, step: TracedStep, projected: bool) -> None:
        self.step = step
        self.projected = projected
        self.prologue, self.body = fx.Graph(), fx.Graph()
        self.slots: dict[fx.Node, fx.Node] = {}
        self.values: dict[fx.Node, _Value] = {}
        self.weight_in_subspace: _Low | None = None
        self.weight_placeholder: fx.Node | None = None

    def run(self) -> LoweredStep:
        nodes = list(self.step.gm.graph.nodes)
        inputs = self._make_inputs(nodes)
        outputs = list(nodes[-1].args[0])
        new_states = outputs[1 : 1 + len(self.step.new_tensors)]
        feeds_state = _ancestors(new_states)
        for node in nodes:
            if node.op == "call_function":
                self.values[node] = self._lower(node, node in feeds_state)
        new_weight = self._value(outputs[0])
        factor = _Scalar(1.0)
        if self.projected:
            assert isinstance(new_weight, _Full)
            factor = new_weight.factor
            if new_weight.update is None:
                raise OptimizerError(f"the step does not depend on the gradient. {WHAT_CAN_BE_LOWERED}")
            result = self._scaled(new_weight.update)
        else:
            result = self._low(new_weight, outputs[0])
        self.body.output((result.node, *(self._low(self._value(node), node).node for node in new_states)))
        if not self._remove_unused_weight() and self.projected:
            inputs.append("projected_weight")
        slots = list(self.slots)
        new_scalars = [self._scalar(self._value(node)) for node in outputs[1 + len(self.step.new_tensors) :]]
        self.prologue.output((*slots, factor.value, *new_scalars))
        return LoweredStep(
            fx.GraphModule({}, self.prologue, "Prologue"),
            fx.GraphModule({}, self.body, "Body"),
            tuple(inputs),
            (*self.step.scalars, SCALE),
            len(slots),
        )

    def _make_inputs(self, nodes: Sequence[fx.Node]) -> list[str]:
        """Creates the placeholders of both graphs, tensors widened to the numbers' dtype; returns the tensor names."""
        named = {node.meta["galore_fx"]["input"]: node for node in nodes if node.op == "placeholder"}
        tensors = [] if self.projected else ["weight"]
        tensors += ["grad", *self.step.new_tensors]
        raw = {name: self.body.placeholder(name) for name in tensors}
        if self.projected:
            self.weight_placeholder = self.body.placeholder("projected_weight")
        self.numbers = self.body.placeholder("numbers")
        for name in tensors:
            if name in named:
                self.values[named[name]] = _Low(self._widen(raw[name]))
        if self.projected:
            self.values[named["weight"]] = _Full(_Scalar(1.0), None)
        for name in self.step.scalars:
            self.values[named[name]] = _Scalar(self.prologue.placeholder(name.replace(".", "_")))
        self.scale = _Scalar(self.prologue.placeholder(SCALE))
        return tensors

    def _lower(self, node: fx.Node, feeds_state: bool) -> _Value:
        arguments = [self._value(a) for a in node.args]
        keywords = {key: self._value(a) for key, a in node.kwargs.items()}
        if all(isinstance(a, _Scalar) for a in [*arguments, *keywords.values()]):
            plain = [a.value for a in arguments if isinstance(a, _Scalar)]
            return _Scalar(self.prologue.call_function(node.target, tuple(plain)))  # type: ignore[arg-type]
        if feeds_state:
            # One LOW operand makes the value LOW; a purely FULL value (wd * W) is projected where it meets a LOW one.
            if any(isinstance(a, _Low) for a in [*arguments, *keywords.values()]):
                arguments = [self._into_subspace(a) if isinstance(a, _Full) else a for a in arguments]
        rule = _RULES.get(str(node.target))
        if rule is not None:
            return rule(self, *arguments, **keywords)
        return self._elementwise(node, arguments, keywords)

    def _elementwise(self, node: fx.Node, arguments: list[_Value], keywords: dict[str, _Value]) -> _Value:
        target = node.target
        elementwise = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
        operands = [*arguments, *keywords.values()]
        if not elementwise or any(isinstance(a, _Full) for a in operands):
            does = "reads the weight in a way that is not scaling or adding" if elementwise else "is not elementwise"
            raise OptimizerError(f"the step's operation {target} {does}. {WHAT_CAN_BE_LOWERED}")
        if keywords:
            raise OptimizerError(
                f"the step's operation {target} has settings {sorted(keywords)}. {WHAT_CAN_BE_LOWERED}"
            )
        plain = []
        for argument in arguments:
            live = isinstance(argument, _Scalar) and isinstance(argument.value, fx.Node)
            if live:
                raise OptimizerError(f"the step's operation {target} takes a live number. {WHAT_CAN_BE_LOWERED}")
            plain.append(argument.node if isinstance(argument, _Low) else argument.value)  # type: ignore[union-attr]
        return _Low(self.body.call_function(target, tuple(plain)))  # type: ignore[arg-type]

    # The algebra of the three labels, from which the rules below are built.

    def add(self, a: _Value, b: _Value) -> _Value:
        if isinstance(a, _Full) or isinstance(b, _Full):
            if isinstance(a, _Scalar) or isinstance(b, _Scalar):
                raise OptimizerError(f"the step adds a number to the weight. {WHAT_CAN_BE_LOWERED}")
            left = a if isinstance(a, _Full) else _Full(_Scalar(0.0), a)
            right = b if isinstance(b, _Full) else _Full(_Scalar(0.0), b)
            update = left.update or right.update
            if left.update and right.update:
                update = self._emit(torch.add, left.update, right.update)
            return _Full(self._scalar_op(operator.add, left.factor, right.factor), update)
        if isinstance(a, _Scalar) and isinstance(b, _Scalar):
            return self._scalar_op(operator.add, a, b)
        return self._emit(torch.add, a, b)

    def mul(self, a: _Value, b: _Value) -> _Value:
        if isinstance(a, _Scalar) and isinstance(b, _Scalar):
            return self._scalar_op(operator.mul, a, b)
        if isinstance(a, _Scalar):
            a, b = b, a
        if isinstance(b, _Scalar) and b.value == 1:
            return a
        if isinstance(a, _Full):
            if not isinstance(b, _Scalar):
                raise OptimizerError(f"the step multiplies the weight by a tensor. {WHAT_CAN_BE_LOWERED}")
            update = self._emit(torch.mul, a.update, b) if a.update else None
            return _Full(self._scalar_op(operator.mul, a.factor, b), update)
        if isinstance(b, _Full):
            return self.mul(b, a)
        return self._emit(torch.mul, a, b)

    def div(self, a: _Value, b: _Value) -> _Value:
        if isinstance(b, _Scalar):
            if isinstance(a, _Full | _Scalar):
                return self.mul(a, self._scalar_op(operator.truediv, _Scalar(1.0), b))
        elif isinstance(a, _Full) or isinstance(b, _Full):
            raise OptimizerError(f"the step divides the weight by a tensor, or by the weight. {WHAT_CAN_BE_LOWERED}")
        return self._emit(torch.div, a, b)

    def _scalar_op(self, function: Callable[..., Any], a: _Scalar, b: _Scalar) -> _Scalar:
        if not isinstance(a.value, fx.Node) and not isinstance(b.value, fx.Node):
            return _Scalar(function(a.value, b.value))
        if function is operator.mul and 1.0 in (a.value, b.value):
            return b if a.value == 1.0 else a
        if function is operator.add and 0.0 in (a.value, b.value):
            return b if a.value == 0.0 else a
        return _Scalar(self.prologue.call_function(function, (a.value, b.value)))

    def _emit(self, function: Callable[..., Any], *operands: _Value) -> _Low:
        return _Low(self.body.call_function(function, tuple(self._operand(a) for a in operands)))

    def _operand(self, value: _Value) -> fx.Node | float:
        """Returns the body node of a LOW value, a constant, or the slot that passes a live number into the body."""
        if isinstance(value, _Low):
            return value.node
        assert isinstance(value, _Scalar)
        if not isinstance(value.value, fx.Node):
            return value.value
        if value.value not in self.slots:
            self.slots[value.value] = self.body.call_function(operator.getitem, (self.numbers, len(self.slots)))
        return self.slots[value.value]

    def _into_subspace(self, value: _Full) -> _Low:
        if self.weight_in_subspace is None:
            assert self.weight_placeholder is not None
            self.weight_in_subspace = _Low(self._widen(self.weight_placeholder))
        weight = self.mul(self.weight_in_subspace, value.factor)
        assert isinstance(weight, _Low)
        return self._emit(torch.add, weight, self._scaled(value.update)) if value.update else weight

    def _remove_unused_weight(self) -> bool:
        unused = self.weight_placeholder is not None and not self.weight_placeholder.users
        if unused:
            self.body.erase_node(self.weight_placeholder)  # type: ignore[arg-type]
        return unused

    def _scaled(self, update: _Low) -> _Low:
        return self._emit(torch.mul, update, self.scale)

    def _widen(self, node: fx.Node) -> fx.Node:
        return self.body.call_method("to", (node, self.numbers))

    def _value(self, argument: Any) -> _Value:
        return self.values[argument] if isinstance(argument, fx.Node) else _Scalar(argument)

    def _low(self, value: _Value, node: Any) -> _Low:
        if isinstance(value, _Full):
            return self._into_subspace(value)
        if isinstance(value, _Scalar):
            raise OptimizerError(f"the step writes the number {node} into a tensor. {WHAT_CAN_BE_LOWERED}")
        return value

    def _scalar(self, value: _Value) -> fx.Node | float:
        assert isinstance(value, _Scalar)
        return value.value


def _ancestors(nodes: Sequence[Any]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = [node for node in nodes if isinstance(node, fx.Node)]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return found


_ONE = _Scalar(1.0)
_Rule = Callable[..., _Value]
# The fused forms that torch.optim uses, in terms of the algebra; other elementwise operations are copied unchanged.
_RULES: dict[str, _Rule] = {
    "aten.add.Tensor": lambda low, a, b, alpha=_ONE: low.add(a, low.mul(b, alpha)),
    "aten.sub.Tensor": lambda low, a, b, alpha=_ONE: low.add(a, low.mul(low.mul(b, alpha), _Scalar(-1.0))),
    "aten.mul.Tensor": lambda low, a, b: low.mul(a, b),
    "aten.div.Tensor": lambda low, a, b: low.div(a, b),
    "aten.neg.default": lambda low, a: low.mul(a, _Scalar(-1.0)),
    "aten.clone.default": lambda low, a: a,
    "aten.detach.default": lambda low, a: a,
    "aten.detach_copy.default": lambda low, a: a,
    "aten.alias.default": lambda low, a: a,
    # The other branch of lerp (weight >= 0.5) differs by rounding only.
    "aten.lerp.Scalar": lambda low, a, b, w: low.add(a, low.mul(low.add(b, low.mul(a, _Scalar(-1.0))), w)),
    "aten.addcmul.default": lambda low, a, b, c, value=_ONE: low.add(a, low.mul(low.mul(b, c), value)),
    "aten.addcdiv.default": lambda low, a, b, c, value=_ONE: low.add(a, low.div(low.mul(b, value), c)),
}
