"""How the states of an optimizer class are stored, and what they are called."""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from galore_fx.errors import OptimizerError
from galore_fx.runtime.formats.blockwise import BLOCK, MIN_ELEMENTS, code_of_zero, num_blocks, stored_bytes

SCALES = "_scales"
# Before the names of the states of a weight's residual.
RESIDUAL = "residual_"


@dataclasses.dataclass(frozen=True)
class StateFormat:
    """How the tensors of an optimizer's state are stored.

    Attributes:
        bits: 8 (blocks of 256, tensors of at least 4096 elements; float32 below), 32 (float32), None (as the weight;
            beside float16, whose range ends far above the squares of gradients, float32).
        unsigned: names of the states that are never negative.
    """

    bits: int | None = None
    unsigned: frozenset[str] = frozenset()

    def is_quantized(self, num_elements: int) -> bool:
        """Whether a state of that many elements is stored as codes."""
        return self.bits == 8 and num_elements >= MIN_ELEMENTS

    def dtype_beside(self, weight_dtype: torch.dtype) -> torch.dtype:
        """Of the states of a weight of this dtype that are not quantised."""
        return weight_dtype if self.bits is None and weight_dtype is not torch.float16 else torch.float32

    def stored_bytes(self, num_elements: int, weight_dtype: torch.dtype) -> int:
        """Bytes of one state of that many elements, for a weight of this dtype."""
        if self.is_quantized(num_elements):
            return stored_bytes(num_elements)
        return num_elements * self.dtype_beside(weight_dtype).itemsize

    def make(self, initial: Mapping[str, float | None], like: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """New state tensors by name: of the shape of ``like``, or codes (blocks * 256,) and ``_scales`` (blocks,).

        Args:
            initial: what fills each.
            like: of the gradient's shape and device.
            dtype: the weight's.
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
    """The code of a block whose elements are all equal: 1 times its scale, or 0."""
    if value < 0:
        raise OptimizerError(f"a state that starts at {value} cannot be kept in 8 bits; use state_bits=32")
    return 255 if value else code_of_zero(signed=signed)


def is_of_residual(name: str) -> bool:
    """Whether a state of this name belongs to a weight's residual."""
    return name.startswith(RESIDUAL) or name in ("columns", "scores")


def residual_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The states of a weight's residual, under the names that the optimizer class gives them."""
    return {name.removeprefix(RESIDUAL): value for name, value in state.items() if name.startswith(RESIDUAL)}


class Layout(Protocol):
    """What the optimizer class keeps per parameter: fill value and format of each tensor, value of each number."""

    @property
    def initial(self) -> Mapping[str, float | None]: ...

    @property
    def scalars(self) -> Mapping[str, float]: ...

    @property
    def format(self) -> StateFormat: ...
