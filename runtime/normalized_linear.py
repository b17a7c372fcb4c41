"""A linear layer whose weight is a magnitude for each row, times a frozen weight with a low-rank change, of norm one.

    V = W0 + s I J        W = M V / ||V||        W0 (m, n) frozen, I (m, r), J (r, n) and M (m,) trained
    Y = X W^T = (X W0^T + s (X J^T) I^T) M / ||V||

Neither V nor W is formed: the norms follow from small products,

    ||V_i||^2 = ||W0_i||^2 + 2 s <(W0 J^T)_i, I_i> + s^2 <(I J J^T)_i, I_i>,

and the gradients of I, J and M from those of these products, the norms' own included. With a norm for each column the
factor M / ||V|| (n,) is applied to X. At the start I = 0 and M = ||W0||, so W is W0 exactly.

Source: GradNormLoRP, Huang et al. 2024, arXiv:2412.19616, reconstructed from its abstract and summaries (their code
contradicts itself): the form is DoRA's, Liu et al. 2024, arXiv:2402.09353. The expansion of the norms is ours.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

# The trained parts of a normalised layer, and what is frozen.
FACTORS = ("factor_out", "factor_in")
TRAINED = (*FACTORS, "magnitude")
_PARTS = (*TRAINED, "base_weight", "base_norms")


class NormalizedLinear(nn.Module):
    """In the place of an ``nn.Linear`` or a transformers ``Conv1D``, whose class it takes the place of.

    Attributes:
        base_weight: W0, (m, n) as (out, in), or (in, out) where ``in_first``; frozen.
        base_norms: squared norms of its rows or columns, float32; a buffer.
        factor_out: I, (m, r). factor_in: J, (r, n).
        magnitude: M, (m,) with a norm for each row, (n,) for each column; float32.
        bias: (m,), or None.
        in_first: whether the weight is stored (in, out).
        by_column: a norm for each column of (out, in) and not for each row.
        scale: s.
    """

    base_weight: Tensor
    base_norms: Tensor
    factor_out: Tensor
    factor_in: Tensor
    magnitude: Tensor
    bias: Tensor | None
    in_first: bool
    by_column: bool
    scale: float

    def forward(self, x: Tensor) -> Tensor:
        """Y, (..., m), from X, (..., n)."""
        base = self._out_in()
        factor = self._factor().to(x.dtype)
        if self.by_column:
            x = x * factor
        y = functional.linear(x, base) + self.scale * functional.linear(
            functional.linear(x, self.factor_in), self.factor_out
        )
        if self.by_column:
            return y if self.bias is None else y + self.bias
        magnified: Tensor = _Magnified.apply(y, factor, self.bias)
        return magnified

    @property
    def weight(self) -> Tensor:
        """W as it is now, stored as the layer's own weight was; formed anew, for whoever reads it besides the layer."""
        return merged_weight(
            self._out_in(), self.factor_out, self.factor_in, self._factor(), self.scale, self.by_column, self.in_first
        )

    def square_norms(self) -> Tensor:
        """||V||^2 of the rows or columns, float32 at least."""
        base, out, in_ = self._out_in(), self.factor_out, self.factor_in
        if self.by_column:
            base, out, in_ = base.T, in_.T, out.T
        low = functional.linear(base, in_).to(self.base_norms.dtype)
        out, in_ = out.to(low.dtype), in_.to(low.dtype)
        cross, own = (low * out).sum(1), ((out @ (in_ @ in_.T)) * out).sum(1)
        return self.base_norms + 2 * self.scale * cross + self.scale**2 * own

    @torch.no_grad()
    def merge_(self, generator: torch.Generator) -> None:
        """Adds s I J to the frozen weight and starts with new factors; W stays what it is, but for rounding."""
        base = self._out_in()
        base.addmm_(self.factor_out, self.factor_in, alpha=self.scale)
        self.base_norms.copy_(_square_norms(base, self.by_column))
        self.factor_out.zero_()
        self.factor_in.copy_(new_factor_in(self.factor_in.shape, generator))

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        m, n = self._out_in().shape
        norm = "column" if self.by_column else "row"
        return f"in_features={n}, out_features={m}, rank={self.factor_in.shape[0]}, a norm for each {norm}"

    def train(self, mode: bool = True) -> "NormalizedLinear":
        """As ``nn.Module.train``; what evaluation has kept is forgotten."""
        vars(self).pop("_kept_factor", None)
        super().train(mode)
        return self

    def _factor(self) -> Tensor:
        """M / ||V||, (m,) or (n,); in evaluation kept until a part of it changes, since a token costs less than it."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._new_factor()
        versions = tuple(getattr(self, name)._version for name in _PARTS)
        kept = vars(self).get("_kept_factor")
        if kept is None or kept[0] != versions:
            kept = vars(self)["_kept_factor"] = (versions, self._new_factor())
        return kept[1]

    def _new_factor(self) -> Tensor:
        # A row of zeros stays one.
        return self.magnitude / self.square_norms().clamp_min(torch.finfo(torch.float32).tiny).sqrt()

    def _out_in(self) -> Tensor:
        return self.base_weight.T if self.in_first else self.base_weight


class _Magnified(torch.autograd.Function):
    """``Z = Y f + b`` whose backward reads Z and not Y.

    The gradient of f, sum over tokens of dZ (Z - b) / f, needs no activation besides Z, which most readers of a linear
    layer's output keep anyway: an activation function its input, attention its queries, keys and values.
    """

    @staticmethod
    def forward(y: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
        """Z, (..., m), from Y (..., m), f (m,), b (m,) or None."""
        return y * factor if bias is None else y * factor + bias

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps Z."""
        ctx.save_for_backward(output, inputs[1], inputs[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """dY, df, db. A factor of zero, of a weight's row of zeros, gets no gradient."""
        z, factor, bias = ctx.saved_tensors
        wide = factor.to(torch.promote_types(factor.dtype, torch.float32))
        total = (grad.to(wide.dtype) * (z if bias is None else z - bias)).sum_to_size(factor.shape)
        of_factor = torch.where(wide != 0, total / torch.where(wide != 0, wide, 1.0), 0.0)
        return grad * factor, of_factor.to(factor.dtype), None if bias is None else grad.sum_to_size(bias.shape)


def normalize(
    layer: nn.Module, rank: int, scale: float, generator: torch.Generator, *, by_column: bool
) -> tuple[type[nn.Module], nn.Parameter]:
    """Turns a plain layer into a ``NormalizedLinear``, in place; returns the class and the weight that it had.

    Args:
        layer: an ``nn.Linear`` or a ``Conv1D``.
        rank: r.
        scale: s.
        generator: of J.
        by_column: a norm for each column.
    """
    weight = layer._parameters.pop("weight")
    assert weight is not None
    in_first = not isinstance(layer, nn.Linear)
    plain = type(layer)
    layer.__class__ = NormalizedLinear
    assert isinstance(layer, NormalizedLinear)
    layer.in_first, layer.by_column, layer.scale = in_first, by_column, scale
    layer.base_weight = nn.Parameter(weight.detach(), requires_grad=False)
    m, n = layer._out_in().shape
    layer.factor_out = nn.Parameter(weight.new_zeros(m, rank))
    layer.factor_in = nn.Parameter(new_factor_in((rank, n), generator).to(weight.device, weight.dtype))
    layer.register_buffer("base_norms", _square_norms(layer._out_in().detach(), by_column))
    with torch.no_grad():
        norms = layer.square_norms().clamp_min(torch.finfo(torch.float32).tiny).sqrt()
    layer.magnitude = nn.Parameter(norms)
    return plain, weight


def restore(layer: "NormalizedLinear", plain: type[nn.Module], weight: nn.Parameter) -> None:
    """Undoes ``normalize``: the layer has the very class and parameter that it had."""
    own = vars(layer)
    for name in (*TRAINED, "base_weight"):
        del layer._parameters[name]
    del layer._buffers["base_norms"]
    for name in ("in_first", "by_column", "scale"):
        del own[name]
    own.pop("_kept_factor", None)
    layer.__class__ = plain  # type: ignore[assignment]
    layer._parameters["weight"] = weight


def new_factor_in(shape: tuple[int, int] | torch.Size, generator: torch.Generator) -> Tensor:
    """J at the start: Gaussian, rows of norm one on average, on the generator's device."""
    gaussian = torch.randn(tuple(shape), generator=generator, device=generator.device)
    return gaussian.mul_(float(shape[1]) ** -0.5)


def merged_weight(
    base: Tensor, factor_out: Tensor, factor_in: Tensor, factor: Tensor, scale: float, by_column: bool, in_first: bool
) -> Tensor:
    """W, as its layer stores it.

    Args:
        base, factor_out, factor_in: W0 (m, n), I (m, r), J (r, n).
        factor: M / ||V||, (m,) or (n,).
        scale, by_column, in_first: as of the layer.
    """
    direction = torch.addmm(base, factor_out, factor_in, alpha=scale)
    weight = direction * (factor if by_column else factor[:, None]).to(direction.dtype)
    return weight.T.contiguous() if in_first else weight


def trained_parts(module: nn.Module) -> list[Tensor]:
    """I, J and M of all normalised layers inside a module."""
    layers = [layer for layer in module.modules() if isinstance(layer, NormalizedLinear)]
    return [getattr(layer, name) for layer in layers for name in TRAINED]


@torch.no_grad()
def with_merged_weights(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of the model in which each normalised layer has its one plain weight.

    Args:
        model: holds the layers.
        state: as of ``model.state_dict()``.
    """
    found = dict(state)
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, NormalizedLinear):
            prefix = f"{name}." if name else ""
            for part in _PARTS:
                found.pop(prefix + part, None)
            found[f"{prefix}weight"] = layer.weight.detach()
    return found


def _square_norms(weight: Tensor, by_column: bool) -> Tensor:
    dim = 0 if by_column else 1
    wide = torch.promote_types(weight.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(weight, dim=dim, dtype=wide)
    return norms.square()
