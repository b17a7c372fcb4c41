"""A linear layer of a frozen weight plus a low-rank change, with rows normalised and scaled by trained magnitudes.

    V = W0 + s I J        W = M V / ||V||        W0 (m, n) frozen, I (m, r), J (r, n) and M (m,) trained
    Y = X W^T = (X W0^T + s (X J^T) I^T) M / ||V||

Neither V nor W is formed. The norms follow from small products,

    ||V_i||^2 = ||W0_i||^2 + 2 s <(W0 J^T)_i, I_i> + s^2 <(I J J^T)_i, I_i>,

and autograd differentiates these products, norms included, for the gradients of I, J and M. With a norm per column
the factor M / ||V|| (n,) is applied to X. At the start I = 0 and M = ||W0||, so W equals W0 exactly.

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

# The trained parts of a normalised layer, and all its parts.
FACTORS = ("factor_out", "factor_in")
TRAINED = (*FACTORS, "magnitude")
_PARTS = (*TRAINED, "base_weight", "base_norms")
# Number of rows of a weight that are merged at once.
_MERGED_ROWS = 1024


class NormalizedLinear(nn.Module):
    """Replaces the class of an ``nn.Linear`` or transformers ``Conv1D`` instance; created by ``normalize`` only.

    Attributes:
        base_weight: W0, (out, in), or (in, out) if ``in_first``; frozen, and possibly stored in 8 bits.
        base_norms: squared norms of W0's rows (m,) or columns (n,), at least float32; a buffer.
        factor_out: I, (m, r).
        factor_in: J, (r, n).
        magnitude: M, (m,) with a norm per row, (n,) with a norm per column; at least float32.
        bias: (m,), or None.
        in_first: whether the weight is stored as (in, out).
        by_column: whether each column of the (out, in) weight has a norm, instead of each row.
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
        """Returns Y (..., m) for X (..., n)."""
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
        """The current W in the layout of the replaced layer; every access computes it anew."""
        return self.merged({name: getattr(self, name) for name in _PARTS})

    def merged(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Returns W in the layout of the replaced layer, from any parts with the layer's names and shapes."""
        base, factor = self._out_in(parts["base_weight"]), self._factor(parts)
        direction = torch.addmm(base, parts["factor_out"], parts["factor_in"], alpha=self.scale)
        weight = direction * (factor if self.by_column else factor[:, None]).to(direction.dtype)
        return weight.T.contiguous() if self.in_first else weight

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        """Loads as a module does; rejects a merged weight even with ``strict=False`` (Trainer's resume)."""
        if f"{prefix}weight" in state_dict and f"{prefix}base_weight" not in state_dict:
            errors = lists[-1]
            errors.append(
                f"{prefix}weight is a merged one, as save_pretrained writes it, and does not tell its factors: "
                "resume from model.state_dict(), or load it into a plain model and compile that"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)

    def square_norms(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Returns ||V||^2 of the rows (m,) or columns (n,), at least float32, even under autocast."""
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
        """Adds s I J to the frozen weight and resets the factors; W is unchanged, except for rounding.

        A 16-bit sum is rounded stochastically; otherwise changes below its precision would be lost.

        Args:
            generator: CPU generator for the rounding and the new J.
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
        """Stores W0 as codes and empties the wide weight.

        Norms and M are adapted to the dequantised W0, so an untrained layer's W equals it. A trained M keeps its ratio
        to its norm. A weight that is already stored as codes, or that is not storable (``is_storable``), is unchanged.

        Args:
            num_bits: bits of a code, 4 or 8.
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
        """Returns the sizes for ``print(model)``."""
        m, n = self._out_in(self.base_weight).shape
        norm = "column" if self.by_column else "row"
        return f"in_features={n}, out_features={m}, rank={self.factor_in.shape[0]}, a norm for each {norm}"

    def _factor(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Returns M / ||V||, (m,) or (n,); 1 at the start even for a row of zeros, whose M is the clamped norm."""
        return parts["magnitude"] / _magnitude(self.square_norms(parts))

    def _out_in(self, weight: Tensor) -> Tensor:
        return weight.T if self.in_first else weight


class _Magnified(torch.autograd.Function):
    """``Z = Y f + b`` with a backward that reads Z instead of Y.

    The gradient of f, the sum over tokens of dZ (Z - b) / f, needs no activation besides Z. Most readers of a linear
    layer's output keep Z anyway: an activation function its input, attention its queries, keys and values. In 16 bits
    this gradient loses digits if b is much larger than Y f. It is zero for a row of zeros with a bias.
    """

    @staticmethod
    def forward(y: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
        """Returns Z (..., m) for Y (..., m), f (m,) and b (m,) or None."""
        return y * factor if bias is None else y * factor + bias

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Saves Z, f and b."""
        ctx.save_for_backward(output, inputs[1], inputs[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns dY, df and db; the gradient of a zero factor is zero."""
        z, factor, bias = ctx.saved_tensors
        wide = factor.to(torch.promote_types(factor.dtype, torch.float32))
        total = (grad.to(wide.dtype) * (z if bias is None else z - bias)).sum_to_size(factor.shape)
        of_factor = torch.where(wide != 0, total / torch.where(wide != 0, wide, 1.0), 0.0)
        return grad * factor, of_factor.to(factor.dtype), None if bias is None else grad.sum_to_size(bias.shape)


def normalize(
    layer: nn.Module, rank: int, scale: float, generator: torch.Generator, *, by_column: bool
) -> tuple[type[nn.Module], dict[str, nn.Parameter | None]]:
    """Turns a plain layer into a ``NormalizedLinear``, in place.

    Args:
        layer: an ``nn.Linear`` or a ``Conv1D``.
        rank: r.
        scale: s.
        generator: generator for J.
        by_column: one norm per column instead of per row.

    Returns:
        The previous class and parameters, as ``restore`` takes them.
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
    # Nothing fails from here on.
    layer.__class__ = NormalizedLinear
    vars(layer).update(in_first=in_first, by_column=by_column, scale=scale)
    layer._parameters.clear()
    layer._parameters.update(made)
    layer._buffers["base_norms"] = base_norms
    return plain, parameters


def restore(layer: "NormalizedLinear", plain: type[nn.Module], parameters: dict[str, nn.Parameter | None]) -> None:
    """Undoes ``normalize``: the layer gets its previous class and the same parameter objects, in their order."""
    for name in ("in_first", "by_column", "scale"):
        del vars(layer)[name]
    del layer._buffers["base_norms"]
    layer._parameters.clear()
    layer._parameters.update(parameters)
    layer.__class__ = plain  # type: ignore[assignment]


def new_factor_in(shape: tuple[int, int] | torch.Size, generator: torch.Generator) -> Tensor:
    """Returns an initial J (r, n): Gaussian, with rows of mean squared norm one, on the generator's device."""
    gaussian = torch.randn(tuple(shape), generator=generator, device=generator.device)
    return gaussian.mul_(float(shape[1]) ** -0.5)


def is_storable(weight: Tensor) -> bool:
    """Returns whether the number of elements of a weight is a multiple of the group size of codes."""
    return weight.numel() % GROUP == 0


def trained_parts(module: nn.Module) -> list[Tensor]:
    """Returns I, J and M of all normalised layers in a module."""
    layers = [layer for layer in module.modules() if isinstance(layer, NormalizedLinear)]
    return [getattr(layer, name) for layer in layers for name in TRAINED]


@torch.no_grad()
def with_merged_weights(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of a state dict in which each normalised layer has a single merged weight instead of its parts.

    Args:
        model: the model with the layers.
        state: state as returned by ``model.state_dict()``. A layer is left unchanged unless all its parts are present.
    """
    found = dict(state)
    for name, layer in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        if isinstance(layer, NormalizedLinear) and all(prefix + part in state for part in _PARTS):
            found[f"{prefix}weight"] = layer.merged({part: found.pop(prefix + part) for part in _PARTS})
    return found


def _add_(base: Tensor, out: Tensor, in_: Tensor, scale: float, generator: torch.Generator) -> None:
    """Computes ``base <- base + s I J`` in place, rounded stochastically for a 16-bit base."""
    if not rounds_by_chance(base.dtype):
        base.addmm_(out, in_, alpha=scale)
        return
    wide = torch.addmm(base.float(), out.float(), in_.float(), alpha=scale)
    noise = torch.randint(0, 2**16, wide.shape, generator=generator, dtype=torch.int32).to(wide.device)
    base.copy_(round_stochastically(wide, base.dtype, noise))


def _magnitude(square_norms: Tensor) -> Tensor:
    """Returns ||V|| from ||V||^2, clamped above zero."""
    return square_norms.clamp_min(torch.finfo(torch.float32).tiny).sqrt()


def _square_norms(weight: Tensor, by_column: bool) -> Tensor:
    dim = 0 if by_column else 1
    wide = torch.promote_types(weight.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(weight, dim=dim, dtype=wide)
    return norms.square()
