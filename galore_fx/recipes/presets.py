"""Defines the published systems as named recipes, and resolves a name and overrides to one recipe."""

import dataclasses
from typing import Any

from galore_fx.errors import SettingError
from galore_fx.recipes.checks import check_recipe
from galore_fx.recipes.recipe import Recipe

RECIPES = {
    # Published defaults: Zhao et al. 2024, arXiv:2403.03507, appendix C (T = 200, alpha = 0.25, r = d/4); every
    # layer refreshes in the same update, as in the released optimizer.
    "galore": Recipe("galore", basis="svd", refresh_gap=200, stagger=False),
    # Published defaults: Zhang et al. 2024, arXiv:2407.08296, and its scripts (gap 200, 500 for 7B; rank a quarter of
    # the hidden size, except 256 of 768 for 130M; queue of 5). The overlap replaces the cosine, with a threshold of its
    # own (docs/quality.md).
    "q-galore": Recipe(
        "q-galore",
        basis="svd",
        refresh="lazy",
        refresh_gap=200,
        stagger=False,
        weight_bits=8,
        basis_bits=4,
        state_bits=8,
    ),
    "full": Recipe("full", projects=False),
    # Reconstructed: Liao et al. 2024, arXiv:2412.19820. Cross-head bases of queries and keys, subspace iteration and
    # sparse residuals are the paper's. Rank, gap, density and residual variant are ours (docs/quality.md).
    "galore+": Recipe(
        "galore+",
        project="input",
        cross_head="query-key",
        residual="sparse",
        residual_variant="scaled",
        rank=0.0625,
        refresh_gap=200,
    ),
    # Su et al. 2025, arXiv:2504.20437: GaLore with randomized refreshes; on one device. Its number of oversampling
    # columns is not known. Here its sketch starts from the old basis.
    "galore2": Recipe("galore2", oversampling=8, refresh_gap=200, stagger=False),
    # Verified against the paper's algorithm 1, arXiv:2602.01233: randomized refreshes when the gradient has stopped
    # moving. The paper does not specify the moments at a refresh; here they are kept, as in GaLore's code.
    "lotus": Recipe("lotus", refresh="lotus", stagger=False),
    # Chen et al. 2024, arXiv:2410.01623: GaLore's settings plus the scaled residual. Updates in the backward are ours.
    "fira": Recipe("fira", basis="svd", refresh_gap=200, stagger=False, residual="scaled", update="in-backward"),
    # Reconstructed from summaries of Huang et al. 2024, arXiv:2412.19616; gap and rank are from its scripts.
    "gradnormlorp": Recipe(
        "gradnormlorp", rank=8, basis="svd", weight_norm="row", refresh_gap=250, stagger=False, scale=1.0
    ),
    # Rank, parts and gap are from its code, arXiv:2505.01744. Reconstructed: the optimizer's own second moment, and
    # orthonormal bases with scale 1; the code's Gaussian ones of 16 elements (a side of 4096) times alpha = 0.25 are
    # orthonormal on average.
    "vlorp": Recipe("vlorp", rank=256, basis="random", granularity=256, refresh_gap=30, stagger=False, scale=1.0),
    # Provisional: frequent warm-started refreshes, since a stale basis loses more than an inexact one.
    "auto": Recipe("auto"),
}
_OVERRIDES = tuple(field.name for field in dataclasses.fields(Recipe) if field.name not in ("name", "projects"))


def resolve_recipe(name: str | Recipe, overrides: dict[str, Any]) -> Recipe:
    """Returns the recipe of that name, or the given recipe, with some parts replaced.

    Raises:
        SettingError: the name or a part is unknown (the message lists all), or values are not allowed.
    """
    if isinstance(name, Recipe):
        recipe = name
    elif isinstance(name, str) and name in RECIPES:
        recipe = RECIPES[name]
    else:
        raise SettingError(f"unknown recipe {name!r}; available: {', '.join(sorted(RECIPES))}")
    for key in overrides:
        if key not in _OVERRIDES:
            raise SettingError(f"unknown override {key}={overrides[key]!r}; a recipe has {', '.join(_OVERRIDES)}")
    recipe = dataclasses.replace(recipe, **overrides)
    check_recipe(recipe)
    return recipe
