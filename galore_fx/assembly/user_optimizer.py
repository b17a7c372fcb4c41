"""Resolves the user's ``optimizer`` argument: a class, a ``functools.partial`` of one, or an instance."""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from galore_fx.errors import OptimizerError, UsageError

OptimizerChoice = type[torch.optim.Optimizer] | Callable[..., torch.optim.Optimizer] | torch.optim.Optimizer
_ALLOWED = "a torch.optim class, a functools.partial of one, or an instance over the model's parameters"


def resolve_optimizer(choice: OptimizerChoice, model: nn.Module) -> torch.optim.Optimizer:
    """Returns the user's instance, or a new one of the user's class over the model's trained parameters.

    Raises:
        OptimizerError: the choice is not an optimizer, has already stepped, is differentiable, misses a trained
            parameter, or lists one that is not the model's.
    """
    named = {id(p): name for name, p in model.named_parameters()}
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    if isinstance(choice, torch.optim.Optimizer):
        instance = choice
        if any(float(state.get("step", 1.0)) > 0.0 for state in instance.state.values()):  # Adagrad's starts at 0
            raise OptimizerError(
                f"the {type(instance).__name__} given has already stepped; its full-rank state cannot be taken over. "
                "Compile before the first step, or pass the class"
            )
    else:
        target = choice.func if isinstance(choice, functools.partial) else choice
        if not (isinstance(target, type) and issubclass(target, torch.optim.Optimizer)):
            raise OptimizerError(f"optimizer={choice!r} is not {_ALLOWED}")
        make: Callable[..., torch.optim.Optimizer] = choice
        instance = make([p for p in model.parameters() if p.requires_grad])
    if any(group.get("differentiable") for group in instance.param_groups):
        raise OptimizerError("differentiable=True keeps a graph through step(), which has none here; leave it out")
    given = {id(p) for group in instance.param_groups for p in group["params"]}
    foreign = len(given - named.keys())  # as in torch, frozen parameters may be listed
    if foreign:
        raise OptimizerError(
            f"{foreign} of the {len(given)} parameters of the {type(instance).__name__} given are not trained "
            f"parameters of this model, nor frozen ones of it; give {_ALLOWED}"
        )
    missing = [trained[key] for key in trained if key not in given]
    if missing:
        raise OptimizerError(
            f"{len(missing)} trained parameters are not in the {type(instance).__name__} given and would never be "
            f"updated: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. Add them, or freeze them "
            "with requires_grad_(False)"
        )
    return instance


def for_a_copy(instance: torch.optim.Optimizer) -> OptimizerChoice:
    """Returns the instance's class with its defaults, to create an optimizer over the parameters of a model's copy."""
    accepted = inspect.signature(type(instance)).parameters
    settings = {key: value for key, value in instance.defaults.items() if key in accepted}
    return functools.partial(type(instance), **settings)


def retire(instance: torch.optim.Optimizer) -> None:
    """Makes ``step``, ``state_dict``, ``load_state_dict`` and ``add_param_group`` of an instance raise UsageError.

    Otherwise the user's own instance would silently train and save nothing.
    """

    def step(self: torch.optim.Optimizer, closure: Any = None) -> Any:
        raise UsageError(
            f"this {type(self).__name__} has been compiled into model.galore_fx.optimizer; call step() on that one. "
            "The param groups are shared, so learning-rate schedulers may stay on either"
        )

    def state_dict(self: torch.optim.Optimizer) -> Any:
        raise UsageError(f"this {type(self).__name__} keeps no state; save model.galore_fx.optimizer.state_dict()")

    def load_state_dict(self: torch.optim.Optimizer, state_dict: Any) -> Any:
        raise UsageError(f"this {type(self).__name__} keeps no state; load it into model.galore_fx.optimizer")

    def add_param_group(self: torch.optim.Optimizer, param_group: Any) -> None:
        raise UsageError(
            f"this {type(self).__name__} has been compiled into model.galore_fx.optimizer, which a later group would "
            "have neither state nor plan in; add all groups before galore_fx.compile"
        )

    for method in (step, state_dict, load_state_dict, add_param_group):
        setattr(instance, method.__name__, types.MethodType(method, instance))
