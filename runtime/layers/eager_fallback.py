"""The uncompiled form of a block: its own code, with the linears of projected weights replaced while it runs.

It serves blocks that cannot be captured and blocks that run in eval mode with grad enabled. The gradient of a projected
weight is R here too, and G is never formed. The exception is a weight that an operation other than a linear layer
reads: autograd delivers the full gradient of that use, and the optimizer projects it.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from galore_fx.runtime.layers.projected_attention import projected_attention
from galore_fx.runtime.layers.projected_linear import WeightLayout, projected_linear
from galore_fx.runtime.subspace.projected_parameter import REGISTRY, GradientForm, ProjectedParameter
from galore_fx.runtime.torch_private import F_LINEAR

_ATTENTION_SIGNATURE = inspect.signature(torch.nn.functional.multi_head_attention_forward)


def run_eager(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls ``forward`` of ``module`` with projected linears and returns its result.

    With transformers' gradient checkpointing, the checkpoint wraps this call, so the recomputed forward also has
    projected linears.
    """
    checkpoint = getattr(module, "_gradient_checkpointing_func", None)
    if not (checkpoint and module.training and getattr(module, "gradient_checkpointing", False)):
        with EagerForm():
            return forward(*args, **kwargs)

    def inner(*inner_args: Any) -> Any:
        module.gradient_checkpointing = False  # type: ignore[assignment]
        try:
            with EagerForm():
                return forward(*inner_args, **kwargs)
        finally:
            module.gradient_checkpointing = True  # type: ignore[assignment]

    return checkpoint(inner, *args)


class EagerForm(TorchFunctionMode):
    """Context in which products of an activation and a projected weight deliver the projected gradient."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Calls a function, or its replacement if ``_RULES`` has one."""
        rule = _RULES.get(func)
        if rule is None:
            return func(*args, **(kwargs or {}))
        return rule(func, *args, **(kwargs or {}))


def _record_of(weight: object) -> tuple[ProjectedParameter, bool] | None:
    """Returns the record of a weight or its transpose, and whether it is transposed; None if not projected here."""
    if not isinstance(weight, Tensor):
        return None
    record = REGISTRY.get(weight)
    transposed = False
    if record is None and weight._base is not None:
        record = REGISTRY.get(weight._base)
        whole = record is not None and (weight.shape, weight.stride()) == _transposed(record.weight)
        transposed, record = whole, record if whole else None
    # No update inside the backward here: the other uses of the weight in the block are unknown.
    forms = GradientForm.FULL, GradientForm.CONSUMED
    if record is not None and record.form is GradientForm.CONSUMED:
        record.num_uses += 1
    if (
        record is None
        or record.form in forms
        or record.is_hooked
        or not (record.weight.requires_grad or record.shares_basis)
    ):
        return None
    return record, transposed


def _transposed(weight: Tensor) -> tuple[torch.Size, tuple[int, ...]]:
    return weight.T.shape, weight.T.stride()


def _product(record: ProjectedParameter, out_in: bool, x: Tensor, bias: Tensor | None) -> Tensor:
    layout = WeightLayout.OUT_IN if out_in else WeightLayout.IN_OUT
    return projected_linear(
        x, record.weight, bias, record.graph_inputs(record.form), layout.value, record.dim.value, record.source.name
    )


def _linear(func: Callable[..., Any], input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:  # noqa: A002
    found = _record_of(weight)
    return func(input, weight, bias) if found is None else _product(found[0], not found[1], input, bias)


def _matmul(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    found = _record_of(args[1]) if len(args) == 2 and not kwargs else None
    return func(*args, **kwargs) if found is None else _product(found[0], found[1], args[0], None)


def _addmm(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    found = _record_of(args[2]) if len(args) == 3 and not kwargs else None
    return func(*args, **kwargs) if found is None else _product(found[0], found[1], args[1], args[0])


def _attention(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    arguments = dict(_ATTENTION_SIGNATURE.bind(*args, **kwargs).arguments)
    projections = {}
    for name, value in arguments.items():
        found = _record_of(value) if isinstance(value, nn.Parameter) else None
        if found is not None:
            projections[name] = (found[0].graph_inputs(found[0].form), found[0].dim.value, found[0].source.name)
    return projected_attention(projections, **arguments) if projections else func(*args, **kwargs)


_RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    F_LINEAR: _linear,
    torch.nn.functional.linear: _linear,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.mm: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.addmm: _addmm,
    torch.nn.functional.multi_head_attention_forward: _attention,
}
