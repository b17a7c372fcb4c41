"""Builds the table of all parts from their declarations, for docs/recipes.md and the option ``--list-parts``."""

from typing import Any

from tabulate import tabulate

from galore_fx.recipes.parts import parts_of
from galore_fx.recipes.presets import RECIPES
from galore_fx.recipes.recipe import Recipe


def parts_table(tablefmt: str = "github") -> str:
    """Returns a row for each part: its effect, its values, the default, and the recipes with another value.

    Args:
        tablefmt: table format of ``tabulate``.
    """
    default = Recipe("default")
    rows = []
    for name, part in parts_of(Recipe).items():
        usual = getattr(default, name)
        others: dict[str, list[str]] = {}
        for recipe in RECIPES.values():
            value = getattr(recipe, name)
            if value != usual:
                others.setdefault(_shown(value), []).append(recipe.name)
        told = "; ".join(f"{value}: {', '.join(names)}" for value, names in others.items())
        rows.append((f"`{name}`" if tablefmt == "github" else name, part.help, part.values.words, _shown(usual), told))
    headers = ("part", "what it does", "values", "default", "recipes with another value")
    return tabulate(rows, headers, tablefmt=tablefmt, disable_numparse=True)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)
