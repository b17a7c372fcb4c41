"""What of torch's would train a compiled model wrongly without a word: refused, or named in a warning."""

import functools
import warnings
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from galore_fx.errors import UsageError
from galore_fx.runtime.subspace.projected_parameter import REGISTRY


@functools.cache
def refuse_other_optimizers(own: type[torch.optim.Optimizer]) -> None:
    """From now on no optimizer but one of this class steps a projected weight, which has no gradient for another.

    Raises (in the other one's ``step()``):
        UsageError: names the optimizer and the weight.
    """

    def refuse(optimizer: torch.optim.Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        if isinstance(optimizer, own) or isinstance(getattr(optimizer, "optimizer", None), own):
            return  # ours, alone or inside a wrapper that moves weights as they are, such as Lookahead
        base = getattr(optimizer, "base_optimizer", None)
        if isinstance(base, own):
            if not any(True for _ in base.records):  # type: ignore[attr-defined]
                return  # at full rank: all gradients are there
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
    """Raises where a ``GradScaler`` has called ``step()``, which tells the optimizer of it by two attributes.

    Raises:
        UsageError: so it has.
    """
    if hasattr(optimizer, "found_inf"):
        for name in ("found_inf", "grad_scale"):
            delattr(optimizer, name)
        raise UsageError(
            "GradScaler unscales the gradients of parameters, and projected gradients are none of those. Train in "
            "bfloat16, or under autocast to it, which need no scaler"
        )


def warn_of_processes() -> None:
    """Says once where several processes train together that each has gradients of its own."""
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
