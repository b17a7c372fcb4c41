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

from galore_fx.runtime.formats.groupwise import GROUP
from galore_fx.runtime.formats.quantized_tensor import QuantizedTensor
from galore_fx.runtime.formats.rounding import round_stochastically, rounds_by_chance

# The trained parts of a normalised layer, and what is frozen.
FACTORS = ("factor_out", "factor_in")
TRAINED = (*FACTORS, "magnitude")
_PARTS = (*TRAINED, "base_weight", "base_norms")
# Rows of a weight that are merged at once.
_MERGED_ROWS = 1024


class NormalizedLinear(nn.Module):
    """In the place of an ``nn.Linear`` or a transformers ``Conv1D``, whose class it takes the place of.

    Attributes:
        base_weight: W0, (m, n) as (out, in), or (in, out) where ``in_first``; frozen, and perhaps stored in 8 bits.
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
        factor = self._factor({name: getattr(self, name) for name in _PARTS})
        if self.by_column:
            x = x * factor.to(x.dtype)
        y = functional.linear(x, self._out_in(self.base_weight)) + self.scale * functional.linear(
            functional.linear(x, self.factor_in), self.factor_out
        )
        bias = None if self.bias is None else self.bias.to(y.dtype)
        if self.by_column:
            return y if bias is None else y + bias
        magnified: Tensor = _Magnified.apply(y, factor.to(y.dtype), bias)
        return magnified

    @property
    def weight(self) -> Tensor:
        """W as it is now, stored as the layer's own weight was; formed anew, for whoever reads it besides the layer."""
        return self.merged({name: getattr(self, name) for name in _PARTS})

    def merged(self, parts: Mapping[str, Tensor]) -> Tensor:
        """W as its layer stores it, of the layer's own parts or of others of these names and shapes."""
        base, factor = self._out_in(parts["base_weight"]), self._factor(parts)
        direction = torch.addmm(base, parts["factor_out"], parts["factor_in"], alpha=self.scale)
        weight = direction * (factor if self.by_column else factor[:, None]).to(direction.dtype)
        return weight.T.contiguous() if self.in_first else weight

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        """As of a module; refuses a merged weight even where missing names are allowed (Trainer's resume)."""
        if f"{prefix}weight" in state_dict and f"{prefix}base_weight" not in state_dict:
            errors = lists[-1]
            errors.append(
                f"{prefix}weight is a merged one, as save_pretrained writes it, and does not tell its factors: "
                "resume from model.state_dict(), or load it into a plain model and compile that"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)

    def square_norms(self, parts: Mapping[str, Tensor]) -> Tensor:
        """||V||^2 of the rows or columns, float32 at least, whatever autocast says."""
        base, out, in_ = self._out_in(parts["base_weight"]), parts["factor_out"], parts["factor_in"]
        if self.by_column:
            base, out, in_ = base.T, in_.T, out.T
        kind = base.device.type if torch.amp.is_autocast_available(base.device.type) else "cpu"
        with torch.autocast(kind, enabled=False):
            low = functional.linear(base, in_).to(parts["base_norms"].dtype)
            out, in_ = out.to(low.dtype), in_.to(low.dtype)
            cross, own = (low * out).sum(1), ((out @ (in_ @ in_.T)) * out).sum(1)
        return parts["base_norms"] + 2 * self.scale * cross + self.scale**2 * own

    @torch.no_grad()
    def merge_(self, generator: torch.Generator) -> None:
        """Adds s I J to the frozen weight and starts with new factors; W stays what it is, but for rounding.

        In bfloat16 the sum is rounded stochastically, since changes below its precision would else be lost.

        Args:
            generator: of the new J, on the CPU.
        """
        base = self._out_in(self.base_weight)
        for begin in range(0, base.shape[0], _MERGED_ROWS):
            rows = slice(begin, begin + _MERGED_ROWS)
            _add_(base[rows], self.factor_out[rows], self.factor_in, self.scale, generator)
        self.base_norms.copy_(_square_norms(base, self.by_column))
        self.factor_out.zero_()
        self.factor_in.copy_(new_factor_in(self.factor_in.shape, generator))

    @torch.no_grad()
    def store_base_(self, num_bits: int) -> None:
        """Stores W0 as codes; norms and M become those of what the codes stand for, so that W(0) is that, too.

        An M that has been trained keeps what it is to its norm.

        Args:
            num_bits: of a code. A weight whose elements make no whole groups of codes stays as it is, as do codes.
        """
        wide = self._parameters["base_weight"]
        assert wide is not None
        if isinstance(wide, QuantizedTensor) or not is_storable(wide):
            return
        before = _magnitude(self.base_norms)
        stored = QuantizedTensor.of(wide.detach(), num_bits)
        self._parameters["base_weight"] = nn.Parameter(stored, requires_grad=False)
        wide.data = wide.data.new_empty(0)
        self.base_norms.copy_(_square_norms(self._out_in(stored.dequantized()), self.by_column))
        after = _magnitude(self.base_norms)
        self.magnitude.copy_(torch.where(self.magnitude == before, after, self.magnitude * (after / before)))

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        m, n = self._out_in(self.base_weight).shape
        norm = "column" if self.by_column else "row"
        return f"in_features={n}, out_features={m}, rank={self.factor_in.shape[0]}, a norm for each {norm}"

    def _factor(self, parts: Mapping[str, Tensor]) -> Tensor:
        """M / ||V||, (m,) or (n,); of a row of zeros M, whatever it is divided by, is one."""
        return parts["magnitude"] / _magnitude(self.square_norms(parts))

    def _out_in(self, weight: Tensor) -> Tensor:
        return weight.T if self.in_first else weight


class _Magnified(torch.autograd.Function):
    """``Z = Y f + b`` whose backward reads Z and not Y.

    The gradient of f, sum over tokens of dZ (Z - b) / f, needs no activation besides Z, which most readers of a linear
    layer's output keep anyway: an activation function its input, attention its queries, keys and values. Where b is
    much larger than Y f, some of its digits are lost in 16 bits; a row of zeros with a bias gets none.
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
) -> tuple[type[nn.Module], dict[str, nn.Parameter | None]]:
    """Turns a plain layer into a ``NormalizedLinear``, in place; returns the class and the parameters that it had.

    Args:
        layer: an ``nn.Linear`` or a ``Conv1D``.
        rank: r.
        scale: s.
        generator: of J.
        by_column: a norm for each column.
    """
    plain: type[nn.Module] = type(layer)
    parameters = dict(layer._parameters)
    weight = parameters["weight"]
    assert weight is not None
    in_first = not isinstance(layer, nn.Linear)
    out_in = weight.detach().T if in_first else weight.detach()
    m, n = out_in.shape
    base_norms = _square_norms(out_in, by_column)
    factor_in = new_factor_in((rank, n), generator).to(weight.device, weight.dtype)
    made = {
        "base_weight": nn.Parameter(weight.detach(), requires_grad=False),
        "factor_out": nn.Parameter(weight.new_zeros(m, rank)),
        "factor_in": nn.Parameter(factor_in),
        "magnitude": nn.Parameter(_magnitude(base_norms)),
        "bias": parameters.get("bias"),
    }
    # All is made; from here on nothing fails.
    layer.__class__ = NormalizedLinear
    vars(layer).update(in_first=in_first, by_column=by_column, scale=scale)
    layer._parameters.clear()
    layer._parameters.update(made)
    layer._buffers["base_norms"] = base_norms
    return plain, parameters


def restore(layer: "NormalizedLinear", plain: type[nn.Module], parameters: dict[str, nn.Parameter | None]) -> None:
    """Undoes ``normalize``: the layer has the very class and parameters that it had, in their order."""
    for name in ("in_first", "by_column", "scale"):
        del vars(layer)[name]
    del layer._buffers["base_norms"]
    layer._parameters.clear()
    layer._parameters.update(parameters)
    layer.__class__ = plain  # type: ignore[assignment]


def new_factor_in(shape: tuple[int, int] | torch.Size, generator: torch.Generator) -> Tensor:
    """J at the start: Gaussian, rows of norm one on average, on the generator's device."""
    gaussian = torch.randn(tuple(shape), generator=generator, device=generator.device)
    return gaussian.mul_(float(shape[1]) ** -0.5)


def is_storable(weight: Tensor) -> bool:
    """Whether the elements of a weight make whole groups of codes."""
    return weight.numel() % GROUP == 0


def trained_parts(module: nn.Module) -> list[Tensor]:
    """I, J and M of all normalised layers inside a module."""
    layers = [layer for layer in module.modules() if isinstance(layer, NormalizedLinear)]
    return [getattr(layer, name) for layer in layers for name in TRAINED]


@torch.no_grad()
def with_merged_weights(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict in which each normalised layer of the model has its one plain weight, made of the state's own parts.

    Args:
        model: holds the layers.
        state: as of ``model.state_dict()``; of a layer whose parts are not all in it nothing is changed.
    """
    found = dict(state)
    for name, layer in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        if isinstance(layer, NormalizedLinear) and all(prefix + part in state for part in _PARTS):
            found[f"{prefix}weight"] = layer.merged({part: found.pop(prefix + part) for part in _PARTS})
    return found


def _add_(base: Tensor, out: Tensor, in_: Tensor, scale: float, generator: torch.Generator) -> None:
    """``base <- base + s I J`` in place, rounded stochastically where the base has 16 bits."""
    if not rounds_by_chance(base.dtype):
        base.addmm_(out, in_, alpha=scale)
        return
    wide = torch.addmm(base.float(), out.float(), in_.float(), alpha=scale)
    noise = torch.randint(0, 2**16, wide.shape, generator=generator, dtype=torch.int32).to(wide.device)
    base.copy_(round_stochastically(wide, base.dtype, noise))


def _magnitude(square_norms: Tensor) -> Tensor:
    """||V|| of its squares, above zero."""
    return square_norms.clamp_min(torch.finfo(torch.float32).tiny).sqrt()


def _square_norms(weight: Tensor, by_column: bool) -> Tensor:
    dim = 0 if by_column else 1
    wide = torch.promote_types(weight.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(weight, dim=dim, dtype=wide)
    return norms.square()
