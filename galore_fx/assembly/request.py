"""What the user asks of ``compile``, ``plan``, the backend or ``explain``, as one value."""

import dataclasses
from typing import Any

import torch

from galore_fx.assembly.user_optimizer import OptimizerChoice
from galore_fx.recipes.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Request:
    """The arguments of ``galore_fx.compile``, whose docstring says what they mean.

    Attributes:
        device: where it is to be trained, "cpu" or "cuda"; None for where the model is.
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
