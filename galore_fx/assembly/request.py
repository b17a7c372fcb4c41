"""The arguments of a user's call of ``compile``, ``plan``, the backend or ``explain``, as one value."""

import dataclasses
from typing import Any

import torch

from galore_fx.assembly.user_optimizer import OptimizerChoice
from galore_fx.recipes.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Request:
    """The arguments of ``galore_fx.compile``, described in its docstring, and the device.

    Attributes:
        device: device to train on, "cpu" or "cuda"; None for the model's.
    """

    budget: str | int | None = None
    sample: object = None
    recipe: str | Recipe = "auto"
    optimizer: OptimizerChoice = torch.optim.AdamW
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    keep_logits: bool = False
    micro_batches: int = 1
    device: str | None = None
    reserve: str | int | None = None
