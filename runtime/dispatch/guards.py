"""Rejects, or warns of, uses of torch that would silently train a compiled model incorrectly."""

import functools
import warnings
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from galore_fx.errors import UsageError
from galore_fx.runtime.subspace.projected_parameter import REGISTRY


@functools.cache
def refuse_other_optimizers(own: type[torch.optim.Optimizer]) -> None:
    """Makes ``step()`` of optimizers of other classes fail on projected weights, whose ``.grad`` they would not get.

    Raises (in ``step()`` of the other optimizer):
        UsageError: the optimizer holds a projected weight, or wraps ours and moves weights as SAM does.
    """

    def refuse(optimizer: torch.optim.Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        if isinstance(optimizer, own) or isinstance(getattr(optimizer, "optimizer", None), own):
            return  # ours, alone or in a wrapper that reads no gradients, such as Lookahead
        base = getattr(optimizer, "base_optimizer", None)
        if isinstance(base, own):
            if not any(True for _ in base.records):  # type: ignore[attr-defined]
                return  # at full rank, so every parameter has its gradient
            raise UsageError(
                f"this {type(optimizer).__name__} moves weights along their .grad between two backwards, as SAM does, "
                "and projected weights have none: only the others would be perturbed. Use recipe='full', whose "
                "gradients are all there, or step model.galore_fx.optimizer itself"
            )
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            record = REGISTRY.get(parameter)
            if record is not None:
                raise UsageError(
                    f"this {type(optimizer).__name__} would not train {record.name}: its gradient is projected, and "
                    "model.galore_fx.optimizer alone steps it. transformers' Trainer takes that one as "
                    "optimizers=(model.galore_fx.optimizer, None)"
                )

    register_optimizer_step_pre_hook(refuse)


def refuse_scaler(optimizer: torch.optim.Optimizer) -> None:
    """Rejects a ``step()`` called by a ``GradScaler``, which announces itself by two attributes of the optimizer.

    Raises:
        UsageError: a ``GradScaler`` called ``step()``.
    """
    if hasattr(optimizer, "found_inf"):
        for name in ("found_inf", "grad_scale"):
            delattr(optimizer, name)
        raise UsageError(
            "GradScaler unscales the gradients of parameters, and projected gradients are none of those. Train in "
            "bfloat16, or under autocast to it, which need no scaler"
        )


def warn_of_processes() -> None:
    """Warns once in distributed training that projected gradients are not reduced over the processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        _name_processes(torch.distributed.get_world_size())


@functools.cache
def _name_processes(number: int) -> None:
    if number > 1:
        warnings.warn(
            f"torch.distributed runs {number} processes, and projected gradients are not reduced over them (DDP and "
            "FSDP see only those of parameters): each process trains a model of its own",
            stacklevel=4,
        )
