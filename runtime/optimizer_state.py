"""The optimizer's state as it is saved: tensors and numbers, restored in place with their dtypes kept."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from galore_fx.errors import OptimizerError
from galore_fx.runtime.blockwise import BLOCK, MIN_ELEMENTS, code_of_zero, num_blocks, stored_bytes

SCALES = "_scales"
# Before the names of the states of a weight's residual.
RESIDUAL = "residual_"
STATE_VERSION = 4


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


@dataclasses.dataclass
class Counters:
    """What has happened so far; saved with the state.

    Attributes:
        num_updates: finished optimizer steps.
        num_skipped: steps (deferred) or single parameters' updates (in-backward) left out for NaN or Inf.
        num_refreshes: bases renewed.
        num_failed_refreshes: refreshes that kept the old basis: the gradient was not finite, zero, or the SVD failed.
    """

    num_updates: int = 0
    num_skipped: int = 0
    num_refreshes: int = 0
    num_failed_refreshes: int = 0

    def load(self, saved: Mapping[str, Any]) -> None:
        """Takes over the counters among what was saved."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, saved[field.name])


def restore(
    state: Mapping[torch.Tensor, dict[str, Tensor]],
    param_groups: list[dict[str, Any]],
    state_dict: dict[str, Any],
    sharing: Collection[int] = (),
) -> dict[str, Any]:
    """Copies a saved state into ``state`` and the settings of ``param_groups``, after it has all been checked.

    ``torch.optim.Optimizer.load_state_dict`` would cast the state to the parameters' dtype and replace the tensors.

    Args:
        state: by parameter.
        param_groups: of the optimizer.
        state_dict: what was saved.
        sharing: identities of the parameters whose basis is that of another one, which is read there.

    Returns:
        The part of the saved state that belongs to no parameter.

    Raises:
        OptimizerError: saved by another optimizer or for other parameters; nothing has been changed then.
    """
    extra: dict[str, Any] | None = state_dict.get("galore_fx")
    if extra is None or extra.get("version") != STATE_VERSION:
        raise OptimizerError(
            f"this state was not saved by galore_fx (version {STATE_VERSION}); it has {sorted(state_dict)}. "
            "Save model.galore_fx.optimizer.state_dict()"
        )
    saved_groups = state_dict["param_groups"]
    sizes, saved_sizes = ([len(group["params"]) for group in groups] for groups in (param_groups, saved_groups))
    if saved_sizes != sizes:
        raise OptimizerError(f"the saved state has groups of {saved_sizes} parameters, this optimizer has {sizes}")
    parameters = [p for group in param_groups for p in group["params"]]
    # A parameter that has been frozen all the time has no state.
    states = [state_dict["state"].get(i, {}) for group in saved_groups for i in group["params"]]
    for parameter, saved in zip(parameters, states, strict=True):
        _check_same(state.get(parameter, {}), saved)
    for parameter, saved in zip(parameters, states, strict=True):
        for name, value in state.get(parameter, {}).items():
            if name != "basis" or id(parameter) not in sharing:
                value.copy_(saved[name])
    for group, saved in zip(param_groups, saved_groups, strict=True):
        group.update({key: value for key, value in saved.items() if key != "params"})
    return extra


def _check_same(state: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    mine = {name: (tuple(value.shape), value.dtype) for name, value in state.items()}
    theirs = {name: (tuple(value.shape), value.dtype) for name, value in saved.items()}
    if mine != theirs:
        raise OptimizerError(
            f"the saved state does not fit: it holds {theirs}, this optimizer keeps {mine}. "
            "Compile with the recipe, rank and optimizer class that the state was saved with"
        )
