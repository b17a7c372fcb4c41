"""Normalises a model's layers while decisions are made, and permanently when it is compiled."""

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
    """Normalises the model's layers within the context if the recipe has ``weight_norm``.

    On leaving the context the model is plain again, unless ``Normalization.keep`` has been called.

    Args:
        model: the model, changed in place.
        request: arguments of the user.

    Yields:
        The request with its rank settled, and the normalisation; the same request and None if nothing is normalised.

    Raises:
        SettingError: the recipe or an override is not valid.
        ModelError: the model has no trainable linear layer.
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
