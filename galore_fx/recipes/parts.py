"""Declares the parts of a recipe: allowed values, effect, and the conditions under which a part matters.

A field of ``Recipe`` carries a ``Part`` in its metadata. From it follow the value checks, the options of the commands,
the tables of docs/recipes.md, the choices that the planner leaves alone and the parts that a simulation switches off.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, get_args

from galore_fx.errors import SettingError


class _Unset:
    def __repr__(self) -> str:
        return "UNSET"


UNSET = _Unset()


@dataclasses.dataclass(frozen=True)
class Values:
    """The allowed values of a part.

    Attributes:
        words: description of the values, for help and tables.
        check: takes the part's name and a value; raises SettingError, which names the value and the allowed ones.
    """

    words: str
    check: Callable[[str, object], None]


@dataclasses.dataclass(frozen=True)
class Part:
    """The declaration of a field of ``Recipe``.

    Attributes:
        values: the allowed values.
        help: the effect, in one line.
        of_projection: whether the part matters only if weights are projected. A user who sets such a part wants
            projection, so the planner does not choose full rank.
        simulated: its value in a simulated training, where only the simulator triggers refreshes; UNSET for no change.
        one_graph: the only value supported by torch.compile's backend, which has one graph; UNSET for any value.
    """

    values: Values
    help: str
    of_projection: bool = True
    simulated: Any = UNSET
    one_graph: Any = UNSET


def part(default: Any, values: Values, help: str, **settings: Any) -> Any:  # noqa: A002 - argparse's word
    """Returns a field of ``Recipe`` with its declaration; ``settings`` are further fields of ``Part``."""
    return dataclasses.field(default=default, metadata={"part": Part(values, help, **settings)})


def parts_of(recipe: Any) -> dict[str, Part]:
    """Returns the declared parts of a recipe or of its class, by name."""
    return {f.name: f.metadata["part"] for f in dataclasses.fields(recipe) if "part" in f.metadata}


def one_of(literal: Any, *, or_none: bool = False) -> Values:
    """Allows the texts of a ``Literal``, and None if ``or_none``."""
    texts = get_args(literal)
    told = ", ".join(texts) + (", or None" if or_none else "")

    def check(name: str, value: object) -> None:
        if value not in texts and not (or_none and value is None):
            raise SettingError(f"{name}={value!r} is not one of {told}")

    return Values(told, check)


def whole_number(least: int, *, none: str | None = None) -> Values:
    """Allows an int of at least ``least``; also None if ``none`` is given, which explains it."""
    told = f"an int of at least {least}" + (f", or None for {none}" if none else "")

    def check(name: str, value: object) -> None:
        if none is not None and value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise SettingError(f"{name}={value!r} must be {told}")

    return Values(told, check)


def bits(*allowed: int) -> Values:
    """Allows these numbers of bits, and None for the dtype of the weight."""
    told = f"{', '.join(map(str, allowed))}, or None for the weight's own dtype"

    def check(name: str, value: object) -> None:
        if value is not None and (value not in allowed or isinstance(value, bool)):
            raise SettingError(f"{name}={value!r} must be {told}")

    return Values(told, check)


def number(words: str, allows: Callable[[float], bool], *, or_none: bool = False) -> Values:
    """Allows finite numbers that ``allows`` accepts, as ``words`` describes; also None if ``or_none``."""

    def check(name: str, value: object) -> None:
        if or_none and value is None:
            return
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or not allows(value):  # type: ignore[arg-type]
            raise SettingError(f"{name}={value!r} must be {words}")

    return Values(f"{words}, or None" if or_none else words, check)


def positive(*, or_none: bool = False) -> Values:
    """Allows finite numbers above 0; also None if ``or_none``."""
    return number("a finite number above 0", lambda value: value > 0, or_none=or_none)


def flag() -> Values:
    """Allows True and False."""

    def check(name: str, value: object) -> None:
        if not isinstance(value, bool):
            raise SettingError(f"{name}={value!r} must be True or False")

    return Values("True or False", check)


def rank_or_share() -> Values:
    """Allows an int of at least 1 (columns of a basis), or a fraction of the weight's shorter side in (0, 1]."""

    def check(name: str, value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise SettingError(f"{name}={value!r} is not a number; give an int >= 1, or a fraction between 0 and 1")
        if isinstance(value, int) and value < 1:
            raise SettingError(f"{name}={value!r} must be at least 1")
        if isinstance(value, float) and not 0.0 < value <= 1.0:
            raise SettingError(
                f"{name}={value!r}: as a fraction of the shorter side it must lie in (0, 1]; give an int for more"
            )

    return Values("an int of at least 1, or a fraction of the shorter side", check)
