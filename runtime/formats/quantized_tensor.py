"""``QuantizedTensor``: a tensor that is stored as 8- or 4-bit codes and used like an ordinary tensor.

Operations run on a temporary dequantised copy. Autograd saves the quantised tensor itself, so an eager linear layer
keeps only the codes until its backward. Copying into it quantises; copying, moving, saving and loading it keep the
codes unchanged. Its gradient is an ordinary tensor.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_fx.errors import UsageError
from galore_fx.runtime.formats.groupwise import dequantize, quantize
from galore_fx.runtime.torch_private import tree_map

_aten = torch.ops.aten


class QuantizedTensor(Tensor):
    """A tensor in 8 or 4 bits, quantised in groups of 256 consecutive elements.

    Attributes:
        codes: (groups, 256) uint8 for 8 bits; (groups, 128) for 4 bits, two codes per byte.
        scales: (groups,) bfloat16.
        zeros: (groups,) uint8.
        bits: bits of a code, 8 or 4.

    It reports the shape, dtype and device of the tensor that it represents.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, shape: Sequence[int], dtype: torch.dtype
    ) -> "QuantizedTensor":
        """Wraps codes and grids as ``groupwise.quantize`` returns them."""
        made = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=codes.device)
        made.codes, made.scales, made.zeros, made.bits = codes, scales, zeros, bits
        return made

    def __init__(self, *_args: Any) -> None:
        pass

    @classmethod
    def of(cls, tensor: Tensor, bits: int) -> "QuantizedTensor":
        """Quantises a finite tensor to the nearest codes of 4 or 8 bits."""
        return cls(*quantize(tensor, bits), bits, tensor.shape, tensor.dtype)

    def dequantized(self) -> Tensor:
        """Returns an ordinary tensor with the same values, shape, dtype and device."""
        return dequantize(self.codes, self.scales, self.zeros, self.bits, list(self.shape), self.dtype)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """The codes, scales and zero points."""
        return self.codes, self.scales, self.zeros

    def with_parts(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> "QuantizedTensor":
        """Returns a tensor with ``change`` applied to each part, and with another reported dtype if one is given."""
        codes, scales, zeros = map(change, self.parts)
        return QuantizedTensor(codes, scales, zeros, self.bits, self.shape, dtype or self.dtype)

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        """Returns the names of the parts and the metadata, for torch.compile and serialisation."""
        return ["codes", "scales", "zeros"], (self.bits, tuple(self.shape), self.dtype)

    @classmethod
    def __tensor_unflatten__(
        cls, parts: dict[str, Tensor], about: tuple[Any, ...], _size: Any, _stride: Any
    ) -> "QuantizedTensor":
        """Rebuilds the tensor from its parts; inverse of ``__tensor_flatten__``."""
        return cls(parts["codes"], parts["scales"], parts["zeros"], *about)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Describes the tensor without its values."""
        return (
            f"QuantizedTensor(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}', bits={self.bits})"
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation on the dequantised values, or on the codes if it leaves them unchanged.

        Raises:
            UsageError: an operation other than ``copy_`` writes into the tensor.
        """
        kwargs = kwargs or {}
        own = _ON_CODES.get(func)
        if own is not None and isinstance(args[0], cls):
            return own(func, *args, **kwargs)
        if func is _aten.copy_.default and not isinstance(args[0], cls):
            return args[0].copy_(args[1].dequantized())
        written = [name for name in _written(func, args) if isinstance(name, cls)]
        if written:
            raise UsageError(
                f"{func} writes into a weight that is stored in {written[0].bits} bits; change it through "
                "model.galore_fx.optimizer, or copy a whole tensor into it with copy_"
            )
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs))


def gradient_leaf(weight: Tensor) -> Tensor:
    """Returns a storage-free zero of the weight's shape and dtype; its gradient flows to the weight."""
    leaf: Tensor = _GradientOf.apply(weight)
    return leaf


class _GradientOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return torch.zeros((), dtype=weight.dtype, device=weight.device).expand(weight.shape)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return grad_output


def plain_tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a state dict with ordinary CPU tensors instead of quantised ones, dequantised one by one."""
    return {
        name: value.with_parts(Tensor.cpu).dequantized() if isinstance(value, QuantizedTensor) else value
        for name, value in state.items()
    }


def stored_tensors(tensor: Tensor) -> tuple[Tensor, ...]:
    """Returns the tensors that own the memory: the parts of a quantised tensor, otherwise the tensor itself."""
    return tensor.parts if isinstance(tensor, QuantizedTensor) else (tensor,)


def _plain(value: Any) -> Any:
    return value.dequantized() if isinstance(value, QuantizedTensor) else value


def _written(func: Any, args: Sequence[Any]) -> list[Any]:
    arguments = func._schema.arguments
    return [
        value for about, value in zip(arguments, args, strict=False) if about.alias_info and about.alias_info.is_write
    ]


def _alias(_func: Any, tensor: QuantizedTensor) -> QuantizedTensor:
    return tensor.with_parts(lambda part: part)


def _clone(_func: Any, tensor: QuantizedTensor, **_settings: Any) -> QuantizedTensor:
    return tensor.with_parts(torch.clone)


def _to_copy(_func: Any, tensor: QuantizedTensor, **settings: Any) -> QuantizedTensor:
    moving = {name: settings[name] for name in ("device", "non_blocking") if settings.get(name) is not None}
    return tensor.with_parts(lambda part: part.to(copy=True, **moving), settings.get("dtype"))


def _copy_(_func: Any, tensor: QuantizedTensor, source: Tensor, _non_blocking: bool = False) -> QuantizedTensor:
    if not (isinstance(source, QuantizedTensor) and source.bits == tensor.bits and source.shape == tensor.shape):
        source = QuantizedTensor.of(source.to(tensor.device).expand(tensor.shape), tensor.bits)
    for mine, theirs in zip(tensor.parts, source.parts, strict=True):
        mine.copy_(theirs)
    return tensor


def _empty_like(_func: Any, tensor: QuantizedTensor, **settings: Any) -> Tensor:
    """Returns an ordinary tensor, as gradients and optimizer states need."""
    about = {"dtype": tensor.dtype, "device": tensor.device, **{k: v for k, v in settings.items() if v is not None}}
    about.pop("memory_format", None)
    return torch.empty(tensor.shape, **about)


_ON_CODES: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _alias,
    _aten.alias.default: _alias,
    _aten.clone.default: _clone,
    _aten._to_copy.default: _to_copy,
    _aten.copy_.default: _copy_,
    _aten.empty_like.default: _empty_like,
}
# The second name is the one under which checkpoints were written before the module moved.
torch.serialization.add_safe_globals(
    [QuantizedTensor, (QuantizedTensor, "galore_fx.runtime.quantized_tensor.QuantizedTensor")]
)
