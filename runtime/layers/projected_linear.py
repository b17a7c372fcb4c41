"""A linear layer whose backward delivers the projected gradient instead of the full one.

The full gradient is ``G = A^T B`` with A (t, m) and B (t, n): A = dY, B = X for a weight stored as (out, in), and
A = X, B = dY for (in, out). Matrix products associate:

    COLS   R = G P   = A^T (B P)        sketch G^T G P   = B^T (A R)
    ROWS   R = P^T G = (A P)^T B        sketch G G^T P   = A^T (B R^T)

This takes 2 t r (m + n) operations instead of 2 t m n + 2 m n r, and no value has m x n elements. A 16-bit R is
balanced before its sketch is computed (``balanced`` in bases.py).

If A and B go directly to the update of the weight (``gradient_consumer.py``), R and the input of a refresh are computed
there.

Not handled: double backward, forward-mode differentiation.
"""

import enum
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from galore_fx.runtime.layers.gradient_consumer import consume_gradient
from galore_fx.runtime.remainder.sparse import gradient_at
from galore_fx.runtime.subspace.projection import ProjectedDim, projected_gradient
from galore_fx.runtime.subspace.sources import SOURCES


class WeightLayout(enum.Enum):
    """Order of the two dimensions of a stored weight."""

    OUT_IN = "out_in"
    IN_OUT = "in_out"


class Settings(NamedTuple):
    """Arguments of ``ProjectedLinear`` that are not tensors.

    Attributes:
        layout: layout of the weight.
        dim: the projected dimension.
        source: name of the basis source that computes the second output of a refreshing backward.
        extra: names of the source's inputs, which are the last arguments.
    """

    layout: WeightLayout
    dim: ProjectedDim
    source: str
    extra: tuple[str, ...]


class Gradients(NamedTuple):
    """Results of the backward of ``ProjectedLinear``, in the order of the arguments of its forward."""

    x: Tensor | None
    weight: None = None
    bias: Tensor | None = None
    basis: None = None
    leaf: Tensor | None = None
    source_leaf: Tensor | None = None
    residual_leaf: Tensor | None = None
    residual_columns: None = None
    consumed: None = None
    settings: None = None


def projected_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inputs: Mapping[str, Tensor],
    layout: str,
    dim: str,
    source: str,
) -> Tensor:
    """Applies ``ProjectedLinear`` with string settings, as graphs call it; respects autocast.

    Args:
        x: X, (..., in).
        weight: W, (out, in) or (in, out) according to ``layout``; gets no gradient.
        bias: (out,), or None.
        inputs: ``record.graph_inputs(form)`` of the weight, by name. If it is ``leaf`` alone, the weight is updated
            inside the backward.
            ``basis``: P, (m, r) or (n, r).
            ``leaf``: Z, shape of R; its gradient is R.
            ``source_leaf``, optional: its gradient is the output of the source's ``deliver``.
            ``residual_leaf`` (m, k) and ``residual_columns``, optional: the leaf's gradient is G at these entries.
            All others are inputs of ``deliver``.
        layout: value of a ``WeightLayout``.
        dim: value of a ``ProjectedDim``.
        source: name of a ``BasisSource``.

    Returns:
        Y, (..., out).
    """
    consumed = weight if "basis" not in inputs else None
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        # As autocast does for a linear layer. R is computed in that dtype; autograd casts it to the dtype of its leaf.
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.detach().to(dtype)
        inputs = {name: _cast(name, value, dtype) for name, value in inputs.items()}
        bias = None if bias is None else bias.to(dtype)
    own = (inputs.get(name) for name in _OWN_INPUTS)
    extra = tuple(name for name in inputs if name not in _OWN_INPUTS)
    settings = Settings(WeightLayout(layout), ProjectedDim(dim), source, extra)
    out: Tensor = ProjectedLinear.apply(x, weight, bias, *own, consumed, settings, *(inputs[name] for name in extra))
    return out


_OWN_INPUTS = ("basis", "leaf", "source_leaf", "residual_leaf", "residual_columns")


def _cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    return value if name.endswith("leaf") or not value.is_floating_point() else value.to(dtype)


class ProjectedLinear(torch.autograd.Function):
    """``Y = X W^T + b`` (or ``X W + b``) with a backward that returns ``R`` for the leaf and None for the weight."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        basis: Tensor | None,
        leaf: Tensor,
        source_leaf: Tensor | None,
        residual_leaf: Tensor | None,
        residual_columns: Tensor | None,
        consumed: Tensor | None,
        settings: Settings,
        *extra: Tensor,
    ) -> Tensor:
        """Returns Y (..., out)."""
        if settings.layout is WeightLayout.OUT_IN:
            return torch.nn.functional.linear(x, weight, bias)
        if bias is None:
            return x @ weight
        return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], weight.shape[1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Saves X, W and P; the partitioner decides whether X or ``X P`` is kept until the backward."""
        x, weight, bias, basis, leaf, source_leaf, _, residual_columns, consumed, settings, *extra = inputs
        consumer = (None, None) if consumed is None else (consumed, leaf)
        ctx.save_for_backward(x, weight, basis, *extra, residual_columns, *consumer)
        ctx.bias_shape = None if bias is None else bias.shape
        ctx.settings, ctx.refreshing = settings, source_leaf is not None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        """Returns dX, db, R for the leaf, and for their leaves the output of ``deliver`` and the entries of G."""
        x, weight, basis, *extra, residual_columns, consumed, leaf = ctx.saved_tensors
        layout, dim, source, names = ctx.settings
        grad_input = None
        if ctx.needs_input_grad[0]:
            grad_input = grad_output @ (weight if layout is WeightLayout.OUT_IN else weight.T)
        inputs = x.reshape(-1, x.shape[-1])
        outputs = grad_output.reshape(-1, grad_output.shape[-1])
        rows, cols = (outputs, inputs) if layout is WeightLayout.OUT_IN else (inputs, outputs)
        grad_bias = outputs.sum_to_size(ctx.bias_shape) if ctx.needs_input_grad[2] else None
        if consumed is not None:
            consumed_gradient = consume_gradient(rows, cols, consumed, leaf, [])
            return (*Gradients(grad_input, bias=grad_bias, leaf=consumed_gradient), *(None for _ in names))
        projected = projected_gradient(rows, cols, basis, dim)
        delivered = None
        if ctx.refreshing:
            delivered = SOURCES[source].deliver(rows, cols, projected, dict(zip(names, extra, strict=True)), dim)
        entries = None if residual_columns is None else gradient_at(rows, cols, residual_columns)
        gradients = Gradients(grad_input, bias=grad_bias, leaf=projected, source_leaf=delivered, residual_leaf=entries)
        return (*gradients, *(None for _ in names))
