"""Restores a saved training state of tensors and numbers, in place and with the dtypes kept."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from galore_fx.errors import OptimizerError

STATE_VERSION = 4


def restore(
    state: Mapping[torch.Tensor, dict[str, Tensor]],
    param_groups: list[dict[str, Any]],
    state_dict: dict[str, Any],
    sharing: Collection[int] = (),
) -> dict[str, Any]:
    """Copies a saved state into ``state`` and the settings of ``param_groups``, after checking all of it.

    ``torch.optim.Optimizer.load_state_dict`` would cast the state to the parameters' dtype and replace the tensors.

    Args:
        state: optimizer states, by parameter.
        param_groups: param groups of the optimizer.
        state_dict: the saved state.
        sharing: ``id`` of each parameter that uses the basis of another one; its own saved basis is ignored.

    Returns:
        The part of the saved state that belongs to no parameter.

    Raises:
        OptimizerError: the state belongs to another optimizer or to other parameters; nothing has been changed.
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
    # A parameter that was always frozen has no state.
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
