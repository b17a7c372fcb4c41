"""What a recipe's parts may be, alone and together."""

import math
from typing import get_args

from galore_fx.errors import SettingError
from galore_fx.recipe import (
    Basis,
    CrossHead,
    LazyStatistic,
    MomentsOnRefresh,
    Project,
    Recipe,
    Refresh,
    Residual,
    ResidualVariant,
    Rounding,
    Sides,
    Update,
    WeightNorm,
)


def check_recipe(recipe: Recipe) -> None:
    """Whether the parts' values are allowed, and go together.

    Raises:
        SettingError: names the value, what is allowed and what to do.
    """
    rank = recipe.rank
    if isinstance(rank, bool) or not isinstance(rank, int | float):
        raise SettingError(f"rank={rank!r} is not a number; give an int >= 1, or a fraction between 0 and 1")
    if isinstance(rank, int) and rank < 1:
        raise SettingError(f"rank={rank!r} must be at least 1")
    if isinstance(rank, float) and not 0.0 < rank <= 1.0:
        raise SettingError(
            f"rank={rank!r}: as a fraction of the shorter side it must lie in (0, 1]; give an int for more"
        )
    texts = {
        "project": Project,
        "basis": Basis,
        "refresh": Refresh,
        "moments_on_refresh": MomentsOnRefresh,
        "residual": Residual,
        "residual_variant": ResidualVariant,
        "lazy_statistic": LazyStatistic,
        "update": Update,
        "rounding": Rounding,
        "sides": Sides,
    }
    for part, values in texts.items():
        if getattr(recipe, part) not in get_args(values):
            raise SettingError(f"{part}={getattr(recipe, part)!r} is not one of {', '.join(get_args(values))}")
    if recipe.cross_head is not None:
        if recipe.cross_head not in get_args(CrossHead):
            told = ", ".join(get_args(CrossHead))
            raise SettingError(f"cross_head={recipe.cross_head!r} is not one of {told}, or None")
        if recipe.project != "input":
            raise SettingError(
                f"cross_head={recipe.cross_head!r} shares a basis of the layer's inputs among its heads, and "
                f"project={recipe.project!r} may project the outputs; use project='input'"
            )
    for part in ("refresh_gap", "lazy_queue", "lazy_limit", "lotus_interval", "residual_warm_up", "iterations"):
        _check_int(part, getattr(recipe, part), 1)
    _check_subspace(recipe)
    _check_int("granularity", recipe.granularity, 1)
    if recipe.granularity > 1:
        _check_parts(recipe)
    if recipe.basis == "random":
        _check_random(recipe)
    threshold = recipe.lazy_threshold
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0.0 <= threshold <= 1.0:
        raise SettingError(f"lazy_threshold={threshold!r} must be a number from 0 to 1")
    if not isinstance(recipe.stagger, bool):
        raise SettingError(f"stagger={recipe.stagger!r} must be True or False")
    for part, allowed in (("weight_bits", (8,)), ("basis_bits", (4, 8)), ("state_bits", (8, 32))):
        bits = getattr(recipe, part)
        if bits is not None and (bits not in allowed or isinstance(bits, bool)):
            told = ", ".join(map(str, allowed))
            raise SettingError(f"{part}={bits!r} must be {told}, or None for the weight's own dtype")
    for part in ("weight_bits", "basis_bits"):
        if getattr(recipe, part) is not None and not recipe.projects:
            raise SettingError(
                f"{part}={getattr(recipe, part)} is for projected weights, and recipe {recipe.name!r} projects none"
            )
    density = recipe.residual_density
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0.0 < density <= 1.0:
        raise SettingError(f"residual_density={density!r} must be a share of a weight's entries, above 0 and at most 1")
    if recipe.residual == "sparse" and not recipe.projects:
        raise SettingError(f"residual='sparse' is for projected weights, and recipe {recipe.name!r} projects none")
    if recipe.residual == "sparse" and recipe.weight_bits is not None:
        raise SettingError(
            f"residual='sparse' changes single entries of a weight, which weight_bits={recipe.weight_bits} keeps in "
            "groups; use weight_bits=None, or residual='drop'"
        )
    if recipe.residual == "scaled":
        _check_scaled(recipe)
    if recipe.weight_norm is not None:
        _check_normalized(recipe)
    elif recipe.merge_factors:
        raise SettingError("merge_factors=True merges the factors of normalised weights; give weight_norm='row', too")
    limit = recipe.refresh_limit
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise SettingError(f"refresh_limit={limit!r} must be an int of at least 1, or None for all that are due")
    if recipe.refresh_limit_bytes is not None:
        _check_int("refresh_limit_bytes", recipe.refresh_limit_bytes, 1)
    if recipe.refresh_limit_s is not None:
        _check_positive("refresh_limit_s", recipe.refresh_limit_s)
    _check_positive("scale", recipe.scale)
    share = recipe.activation_budget
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0.0 <= share <= 1.0:
        raise SettingError(f"activation_budget={share!r} must be a number from 0 (recompute) to 1 (keep)")
    if recipe.max_grad_norm is not None:
        _check_positive("max_grad_norm", recipe.max_grad_norm)
        if recipe.update == "in-backward":
            raise SettingError(
                "max_grad_norm needs all gradients at once, which update='in-backward' never holds; "
                "use update='deferred', or max_grad_norm=None"
            )


def _check_subspace(recipe: Recipe) -> None:
    """How a basis is found and when."""
    _check_int("oversampling", recipe.oversampling, 0)
    for part, plain in (("iterations", 1), ("oversampling", 0)):
        number = getattr(recipe, part)
        if number == plain:
            continue
        if recipe.basis != "subspace-iteration":
            raise SettingError(f"{part}={number} is of basis='subspace-iteration', and basis={recipe.basis!r} has none")
        if recipe.refresh == "lazy" and recipe.lazy_statistic == "overlap":
            raise SettingError(
                f"{part}={number} changes what the overlap of a sketch means; use refresh='fixed' or 'lotus', "
                "lazy_statistic='first-vector', or leave it"
            )
    if recipe.iterations > 1 and recipe.refresh != "fixed":
        raise SettingError(
            f"iterations={recipe.iterations} are updates in a row that follow from a fixed gap; with refresh="
            f"{recipe.refresh!r} use 1"
        )
    limits = ("refresh_limit", "refresh_limit_bytes", "refresh_limit_s")
    given = [part for part in limits if getattr(recipe, part) is not None]
    if given and (recipe.iterations > 1 or recipe.merge_factors):
        several = f"iterations={recipe.iterations}" if recipe.iterations > 1 else "merge_factors=True"
        raise SettingError(
            f"{several} renews a basis in several updates in a row, which {given[0]}={getattr(recipe, given[0])!r} may "
            f"break up; use {given[0]}=None"
        )
    if recipe.iterations > recipe.refresh_gap:
        raise SettingError(
            f"iterations={recipe.iterations} take as many updates, and the next refresh is refresh_gap="
            f"{recipe.refresh_gap} updates after the first of them"
        )
    _check_positive("lotus_threshold", recipe.lotus_threshold)
    if recipe.refresh == "lotus" and not recipe.projects:
        raise SettingError(f"refresh='lotus' is for projected weights, and recipe {recipe.name!r} projects none")


def _check_random(recipe: Recipe) -> None:
    """A basis that is drawn says nothing about a gradient."""
    for part, use in (("cross_head", None), ("refresh", "fixed")):
        value = getattr(recipe, part)
        if value not in (use, "lotus"):
            raise SettingError(
                f"basis='random' looks at no gradient, and {part}={value!r} decides on one; use {part}={use!r}, or "
                "another basis"
            )


def _check_parts(recipe: Recipe) -> None:
    """One small basis serves several parts of a dimension."""
    if not recipe.projects:
        raise SettingError(
            f"granularity={recipe.granularity} cuts the bases of projected weights into parts, and recipe "
            f"{recipe.name!r} projects none"
        )
    only = {"basis": "random", "residual": "drop", "weight_norm": None, "weight_bits": None, "basis_bits": None}
    for part, use in only.items():
        value = getattr(recipe, part)
        if value != use:
            raise SettingError(
                f"granularity={recipe.granularity} projects the parts of a dimension with one random basis, and "
                f"{part}={value!r} does not know parts; use {part}={use!r}, or granularity=1"
            )


def _check_scaled(recipe: Recipe) -> None:
    """Fira's residual needs each full gradient once, where it is made."""
    if not recipe.projects:
        raise SettingError(f"residual='scaled' is for projected weights, and recipe {recipe.name!r} projects none")
    if recipe.update != "in-backward":
        raise SettingError(
            f"residual='scaled' needs the full gradients, and update={recipe.update!r} would hold all of them at once; "
            "use update='in-backward', which makes each of them in parts"
        )
    if recipe.weight_bits is not None:
        raise SettingError(
            f"residual='scaled' adds to a plain weight, which weight_bits={recipe.weight_bits} has not; use "
            "weight_bits=None, or residual='drop'"
        )


def _check_normalized(recipe: Recipe) -> None:
    """What is trained are factors, and their gradients are small."""
    if recipe.weight_norm not in get_args(WeightNorm):
        raise SettingError(f"weight_norm={recipe.weight_norm!r} is not one of row, column, or None")
    if not recipe.projects:
        raise SettingError(f"weight_norm={recipe.weight_norm!r} trains factors, and recipe {recipe.name!r} has none")
    _check_positive("factor_scale", recipe.factor_scale)
    if not isinstance(recipe.merge_factors, bool):
        raise SettingError(f"merge_factors={recipe.merge_factors!r} must be True or False")
    if recipe.merge_factors and recipe.weight_bits is not None:
        raise SettingError(
            f"merge_factors=True adds to the frozen weight, which weight_bits={recipe.weight_bits} stores as codes; "
            "use weight_bits=None, or merge_factors=False"
        )
    if recipe.merge_factors and (recipe.refresh != "fixed" or recipe.stagger):
        raise SettingError(
            f"merge_factors=True renews all bases after each gap; use refresh='fixed' and stagger=False (now "
            f"{recipe.refresh!r} and {recipe.stagger})"
        )
    fixed = {"cross_head": None, "residual": "drop", "basis_bits": None, "oversampling": 0}
    if recipe.sides == "two":
        fixed |= {"basis": "svd", "moments_on_refresh": recipe.moments_on_refresh}
        if recipe.moments_on_refresh == "rotate":
            raise SettingError("moments_on_refresh='rotate' knows one basis, and sides='two' has two; use 'keep'")
    for part, only in fixed.items():
        value = getattr(recipe, part)
        if value != only:
            raise SettingError(
                f"{part}={value!r} is for weights trained in a subspace of their own, and weight_norm="
                f"{recipe.weight_norm!r} trains factors of them; use {part}={only!r}"
            )


def _check_int(part: str, number: object, least: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise SettingError(f"{part}={number!r} must be an int of at least {least}")


def _check_positive(part: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:  # type: ignore[arg-type, operator]
        raise SettingError(f"{part}={value!r} must be a finite number above 0")
