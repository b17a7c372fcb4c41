"""Normalises a model's layers while something is decided about it, and for good where it is compiled."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from galore_fx.assembly.request import Request
from galore_fx.assembly.user_model import is_compiled
from galore_fx.passes.model_graph.normalize_weights import Normalization, normalize_weights
from galore_fx.recipes.presets import resolve_recipe


@contextmanager
def normalized(model: nn.Module, request: Request) -> Iterator[tuple[Request, Normalization | None]]:
    """The model with normalised layers where the recipe asks for them; plain again afterwards, unless it is kept.

    Args:
        model: changed in place.
        request: what is asked for.

    Yields:
        The request about the model as it is now, whose rank is settled; and the normalisation, None for none.
    """
    recipe = resolve_recipe(request.recipe, request.overrides)
    is_plain = isinstance(model, nn.Module) and not is_compiled(model)
    if recipe.weight_norm is None or not is_plain or hasattr(model, "_orig_mod"):
        yield request, None
        return
    settled: dict[str, Any] = {"rank": recipe.rank} if isinstance(request.recipe, str) else {}
    asked = dataclasses.replace(request, overrides={**request.overrides, **settled})
    groups = request.optimizer.param_groups if isinstance(request.optimizer, torch.optim.Optimizer) else []
    with normalize_weights(
        model, groups, rank=recipe.rank, scale=recipe.factor_scale, by_column=recipe.weight_norm == "column"
    ) as normalization:
        yield asked, normalization
