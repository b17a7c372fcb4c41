"""Checks a recipe against a table of excluded combinations of parts, each with its message."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from galore_fx.errors import SettingError
from galore_fx.recipes.parts import parts_of
from galore_fx.recipes.recipe import Recipe

Condition = Callable[[Recipe], bool]


@dataclasses.dataclass(frozen=True)
class Rule:
    """A combination of parts that is excluded.

    Attributes:
        broken: whether a recipe has this combination.
        message: message of the error, with fields of the recipe in braces.
    """

    broken: Condition
    message: str


def check_recipe(recipe: Recipe) -> None:
    """Checks that each part's value is allowed and that all values are compatible.

    Raises:
        SettingError: they are not; the message names the value, the allowed ones and the remedy.
    """
    for name, part in parts_of(recipe).items():
        part.values.check(name, getattr(recipe, name))
    fields = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    for rule in RULES:
        if rule.broken(recipe):
            raise SettingError(rule.message.format(**fields))


def _only(condition: Condition, allowed: Mapping[str, Any], message: str) -> tuple[Rule, ...]:
    """Returns rules that allow only one value of each given part if a condition holds.

    Args:
        condition: condition on the recipe.
        allowed: the only allowed value of each part.
        message: message in which PART is replaced by the part and its value, USE by the part and the allowed value.
    """

    def rule(name: str, value: Any) -> Rule:
        text = message.replace("PART", f"{name}={{{name}!r}}").replace("USE", f"{name}={value!r}")
        return Rule(lambda recipe: condition(recipe) and getattr(recipe, name) != value, text)

    return tuple(rule(name, value) for name, value in allowed.items())


def _needs_projection(condition: Condition, what: str) -> Rule:
    return Rule(
        lambda r: condition(r) and not r.projects,
        f"{what} is for projected weights, and recipe {{name!r}} projects none",
    )


_LIMITS = ("refresh_limit", "refresh_limit_bytes", "refresh_limit_s")
_OF_FACTORS = {"cross_head": None, "residual": "drop", "basis_bits": None, "oversampling": 0}

RULES: tuple[Rule, ...] = (
    # Heads.
    Rule(
        lambda r: r.cross_head is not None and r.project != "input",
        "cross_head={cross_head!r} shares a basis of the layer's inputs among its heads, and project={project!r} may "
        "project the outputs; use project='input'",
    ),
    # Method and time of a refresh.
    *_only(
        lambda r: r.basis != "subspace-iteration",
        {"iterations": 1, "oversampling": 0},
        "PART is of basis='subspace-iteration', and basis={basis!r} has none",
    ),
    *_only(
        lambda r: r.refresh == "lazy" and r.lazy_statistic == "overlap",
        {"iterations": 1, "oversampling": 0},
        "PART changes what the overlap of a sketch means; use refresh='fixed' or 'lotus', "
        "lazy_statistic='first-vector', or leave it",
    ),
    Rule(
        lambda r: r.iterations > 1 and r.refresh != "fixed",
        "iterations={iterations} are updates in a row that follow from a fixed gap; with refresh={refresh!r} use 1",
    ),
    *_only(
        lambda r: r.iterations > 1,
        dict.fromkeys(_LIMITS),
        "iterations={iterations} renews a basis in several updates in a row, which PART may break up; use USE",
    ),
    *_only(
        lambda r: r.merge_factors,
        dict.fromkeys(_LIMITS),
        "merge_factors=True renews a basis in several updates in a row, which PART may break up; use USE",
    ),
    Rule(
        lambda r: r.iterations > r.refresh_gap,
        "iterations={iterations} take as many updates, and the next refresh is refresh_gap={refresh_gap} updates after "
        "the first of them",
    ),
    _needs_projection(lambda r: r.refresh == "lotus", "refresh='lotus'"),
    # One small basis shared by several parts of a dimension.
    Rule(
        lambda r: r.granularity > 1 and not r.projects,
        "granularity={granularity} cuts the bases of projected weights into parts, and recipe {name!r} projects none",
    ),
    *_only(
        lambda r: r.granularity > 1,
        {"basis": "random", "residual": "drop", "weight_norm": None, "weight_bits": None, "basis_bits": None},
        "granularity={granularity} projects the parts of a dimension with one random basis, and PART does not know "
        "parts; use USE, or granularity=1",
    ),
    # A random basis does not depend on the gradient.
    Rule(
        lambda r: r.basis == "random" and r.cross_head is not None,
        "basis='random' looks at no gradient, and cross_head={cross_head!r} decides on one; use cross_head=None, or "
        "another basis",
    ),
    Rule(
        lambda r: r.basis == "random" and r.refresh == "lazy",
        "basis='random' looks at no gradient, and refresh={refresh!r} decides on one; use refresh='fixed', or another "
        "basis",
    ),
    # Formats.
    _needs_projection(lambda r: r.weight_bits is not None, "weight_bits={weight_bits}"),
    _needs_projection(lambda r: r.basis_bits is not None, "basis_bits={basis_bits}"),
    # Residuals.
    _needs_projection(lambda r: r.residual == "sparse", "residual='sparse'"),
    Rule(
        lambda r: r.residual == "sparse" and r.weight_bits is not None,
        "residual='sparse' changes single entries of a weight, which weight_bits={weight_bits} keeps in groups; use "
        "weight_bits=None, or residual='drop'",
    ),
    _needs_projection(lambda r: r.residual == "scaled", "residual='scaled'"),
    Rule(
        lambda r: r.residual == "scaled" and r.update != "in-backward",
        "residual='scaled' needs the full gradients, and update={update!r} would hold all of them at once; use "
        "update='in-backward', which makes each of them in parts",
    ),
    Rule(
        lambda r: r.residual == "scaled" and r.weight_bits is not None,
        "residual='scaled' adds to a plain weight, which weight_bits={weight_bits} has not; use weight_bits=None, or "
        "residual='drop'",
    ),
    # Normalised weights: factors are trained, whose gradients are small.
    Rule(
        lambda r: r.merge_factors and r.weight_norm is None,
        "merge_factors=True merges the factors of normalised weights; give weight_norm='row', too",
    ),
    Rule(
        lambda r: r.weight_norm is not None and not r.projects,
        "weight_norm={weight_norm!r} trains factors, and recipe {name!r} has none",
    ),
    Rule(
        lambda r: r.merge_factors and r.weight_bits is not None,
        "merge_factors=True adds to the frozen weight, which weight_bits={weight_bits} stores as codes; use "
        "weight_bits=None, or merge_factors=False",
    ),
    Rule(
        lambda r: r.merge_factors and (r.refresh != "fixed" or r.stagger),
        "merge_factors=True renews all bases after each gap; use refresh='fixed' and stagger=False (now {refresh!r} "
        "and {stagger})",
    ),
    Rule(
        lambda r: r.weight_norm is not None and r.sides == "two" and r.moments_on_refresh == "rotate",
        "moments_on_refresh='rotate' knows one basis, and sides='two' has two; use 'keep'",
    ),
    *_only(
        lambda r: r.weight_norm is not None,
        _OF_FACTORS,
        "PART is for weights trained in a subspace of their own, and weight_norm={weight_norm!r} trains factors of "
        "them; use USE",
    ),
    *_only(
        lambda r: r.weight_norm is not None and r.sides == "two",
        {"basis": "svd"},
        "PART is for weights trained in a subspace of their own, and weight_norm={weight_norm!r} trains factors of "
        "them; use USE",
    ),
    # Updates in the backward.
    Rule(
        lambda r: r.max_grad_norm is not None and r.update == "in-backward",
        "max_grad_norm needs all gradients at once, which update='in-backward' never holds; use update='deferred', or "
        "max_grad_norm=None",
    ),
)
