"""The linear whose backward delivers the projected gradient and never the full one.

With rows A (t, m) and columns B (t, n) of the full gradient ``G = A^T B`` (for a weight stored (out, in): A = dY,
B = X; stored (in, out): A = X, B = dY) matrix products associate:

    COLS   R = G P   = A^T (B P)        sketch G^T G P   = B^T (A R)
    ROWS   R = P^T G = (A P)^T B        sketch G G^T P   = A^T (B R^T)

In 16 bits R is balanced before a sketch is made of it (``balanced`` in bases.py).

2 t r (m + n) operations instead of 2 t m n + 2 m n r, and no value of m x n elements.

Where A and B go straight to the update of the weight (``gradient_consumer.py``), R and what a refresh wants are made
there.

Not handled: double backward, forward-mode differentiation.
"""

import enum
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from galore_fx.runtime.layers.gradient_consumer import consume_gradient
from galore_fx.runtime.remainder.sparse import gradient_at
from galore_fx.runtime.subspace.bases import sketch
from galore_fx.runtime.subspace.head_basis import gradient_of_heads
from galore_fx.runtime.subspace.projection import ProjectedDim, projected_gradient

# What the record of a weight may give, in the order in which ``ProjectedLinear`` takes it.
_INPUTS = ("basis", "leaf", "sketch_leaf", "sketch_columns", "head_features", "residual_leaf", "residual_columns")


class WeightLayout(enum.Enum):
    """How a weight stores its two dimensions."""

    OUT_IN = "out_in"
    IN_OUT = "in_out"


def projected_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inputs: Mapping[str, Tensor],
    layout: str,
    dim: str,
) -> Tensor:
    """A linear layer as a graph calls it: ``ProjectedLinear`` with its settings as text, and autocast obeyed.

    Args:
        x: (..., in).
        weight: W, (out, in) or (in, out) as ``layout`` says; gets no gradient.
        bias: what is added to the product: (out,), or None.
        inputs: what the weight's record gives for the form that is wanted, by name. ``basis``: P, (m, r) or (n, r).
            ``leaf``: Z, shape of R; its gradient is R. ``sketch_leaf``, if given: shape of P, its gradient is the
            sketch of the next basis; with ``head_features``, (k,): shape of the gradient of these features, which is
            its own; with ``sketch_columns``, (m, p) or (n, p): (m, r + p) or (n, r + p), the sketch of these too.
            ``residual_leaf`` and ``residual_columns``, (m, k): its gradient is G at these entries. The leaf alone:
            the weight is updated in the backward.
        layout: value of a ``WeightLayout``.
        dim: value of a ``ProjectedDim``.

    Returns:
        Y, (..., out).
    """
    consumed = weight if "basis" not in inputs else None
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        # As autocast does for a linear layer; R is computed in that precision, and cast to its leaf's by autograd.
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.detach().to(dtype)
        cast = {name: inputs[name].to(dtype) for name in ("basis", "sketch_columns") if name in inputs}
        inputs = {**inputs, **cast}
        bias = None if bias is None else bias.to(dtype)
    extra = (inputs.get(name) for name in _INPUTS)
    out: Tensor = ProjectedLinear.apply(x, weight, bias, *extra, consumed, WeightLayout(layout), ProjectedDim(dim))
    return out


class ProjectedLinear(torch.autograd.Function):
    """``Y = X W^T + b`` (or ``X W + b``) whose backward returns ``R`` for the leaf and nothing for the weight."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        basis: Tensor | None,
        leaf: Tensor,
        sketch_leaf: Tensor | None,
        sketch_columns: Tensor | None,
        head_features: Tensor | None,
        residual_leaf: Tensor | None,
        residual_columns: Tensor | None,
        consumed: Tensor | None,
        layout: WeightLayout,
        dim: ProjectedDim,
    ) -> Tensor:
        """Y, (..., out)."""
        if layout is WeightLayout.OUT_IN:
            return torch.nn.functional.linear(x, weight, bias)
        if bias is None:
            return x @ weight
        return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], weight.shape[1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Saves X, W, P; the partitioner decides whether X or ``X P`` is what lives until the backward."""
        x, weight, bias, basis, leaf, sketch_leaf, sketch_columns, head_features, _, residual_columns = inputs[:10]
        consumed, layout, dim = inputs[10:]
        consumer = (None, None) if consumed is None else (consumed, leaf)
        ctx.save_for_backward(x, weight, basis, sketch_columns, head_features, residual_columns, *consumer)
        ctx.bias_shape = None if bias is None else bias.shape
        ctx.layout, ctx.dim, ctx.sketched = layout, dim, sketch_leaf is not None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        """dX, None for W, db, None for P, R, the sketch or the heads' gradient, and entries of G for their leaves."""
        x, weight, basis, sketch_columns, head_features, residual_columns, consumed, leaf = ctx.saved_tensors
        grad_input = None
        if ctx.needs_input_grad[0]:
            grad_input = grad_output @ (weight if ctx.layout is WeightLayout.OUT_IN else weight.T)
        inputs = x.reshape(-1, x.shape[-1])
        outputs = grad_output.reshape(-1, grad_output.shape[-1])
        rows, cols = (outputs, inputs) if ctx.layout is WeightLayout.OUT_IN else (inputs, outputs)
        grad_bias = outputs.sum_to_size(ctx.bias_shape) if ctx.needs_input_grad[2] else None
        if consumed is not None:
            projected = consume_gradient(rows, cols, consumed, leaf, [])
            return grad_input, None, grad_bias, None, projected, *(None,) * 8
        projected = projected_gradient(rows, cols, basis, ctx.dim)
        next_basis = None
        if ctx.sketched and head_features is not None:
            next_basis = gradient_of_heads(rows, cols, head_features, ctx.dim)
        elif ctx.sketched:
            start = projected
            if sketch_columns is not None:
                extra = projected_gradient(rows, cols, sketch_columns, ctx.dim)
                start = torch.cat([projected, extra], dim=0 if ctx.dim is ProjectedDim.ROWS else 1)
            next_basis = sketch(rows, cols, start, ctx.dim)
        entries = None if residual_columns is None else gradient_at(rows, cols, residual_columns)
        return grad_input, None, grad_bias, None, projected, next_basis, None, None, entries, *(None,) * 4
