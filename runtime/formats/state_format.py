"""Storage formats and names of optimizer states."""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from galore_fx.errors import OptimizerError
from galore_fx.runtime.formats.blockwise import BLOCK, MIN_ELEMENTS, code_of_zero, num_blocks, stored_bytes

SCALES = "_scales"
# Prefix of the state names of a weight's residual.
RESIDUAL = "residual_"


@dataclasses.dataclass(frozen=True)
class StateFormat:
    """Storage format of the state tensors of an optimizer.

    Attributes:
        bits: 8 (blocks of 256 for tensors of at least 4096 elements, float32 for smaller ones), 32 (float32), or None
            (the dtype of the weight; float32 for float16 weights, because squared gradients underflow in float16).
        unsigned: names of the states that are never negative.
    """

    bits: int | None = None
    unsigned: frozenset[str] = frozenset()

    def is_quantized(self, num_elements: int) -> bool:
        """Returns whether a state with this many elements is stored as 8-bit codes."""
        return self.bits == 8 and num_elements >= MIN_ELEMENTS

    def dtype_beside(self, weight_dtype: torch.dtype) -> torch.dtype:
        """Returns the dtype of unquantised states for a weight of this dtype."""
        return weight_dtype if self.bits is None and weight_dtype is not torch.float16 else torch.float32

    def stored_bytes(self, num_elements: int, weight_dtype: torch.dtype) -> int:
        """Returns the bytes of one state with this many elements, for a weight of this dtype."""
        if self.is_quantized(num_elements):
            return stored_bytes(num_elements)
        return num_elements * self.dtype_beside(weight_dtype).itemsize

    def make(self, initial: Mapping[str, float | None], like: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Returns new state tensors by name.

        Args:
            initial: fill value of each state; None means 0.
            like: a tensor with the shape and device of the gradient.
            dtype: dtype of the weight.

        Returns:
            Tensors of the shape of ``like``; for quantised states uint8 codes (blocks * 256,) and, under the suffix
            ``_scales``, float32 scales (blocks,).

        Raises:
            OptimizerError: a quantised state has a negative initial value.
        """
        if not self.is_quantized(like.numel()):
            dtype = self.dtype_beside(dtype)
            return {
                name: torch.full(like.shape, value or 0.0, dtype=dtype, device=like.device)
                for name, value in initial.items()
            }
        found = {}
        blocks = num_blocks(like.numel())
        for name, value in initial.items():
            code = _code_of_one(value or 0.0, signed=name not in self.unsigned)
            found[name] = torch.full((blocks * BLOCK,), code, dtype=torch.uint8, device=like.device)
            found[name + SCALES] = torch.full((blocks,), abs(value or 0.0), device=like.device)
        return found


def _code_of_one(value: float, *, signed: bool) -> int:
    """Returns the code of a block of equal elements: the code of 1 (times the scale), or of 0."""
    if value < 0:
        raise OptimizerError(f"a state that starts at {value} cannot be kept in 8 bits; use state_bits=32")
    return 255 if value else code_of_zero(signed=signed)


def is_of_residual(name: str) -> bool:
    """Returns whether a state of this name belongs to the residual of a weight."""
    return name.startswith(RESIDUAL) or name in ("columns", "scores")


def residual_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the states of a weight's residual under the names of the optimizer class."""
    return {name.removeprefix(RESIDUAL): value for name, value in state.items() if name.startswith(RESIDUAL)}


class Layout(Protocol):
    """Per-parameter state of an optimizer class: fill value and format of the tensors, values of the scalars."""

    @property
    def initial(self) -> Mapping[str, float | None]: ...

    @property
    def scalars(self) -> Mapping[str, float]: ...

    @property
    def format(self) -> StateFormat: ...
