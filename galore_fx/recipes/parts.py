"""How a part of a recipe declares itself: what it may be, what it does, and when it means something.

A field of ``Recipe`` carries a ``Part`` in its metadata. The value checks, the options of the commands, the tables of
docs/recipes.md, what a planner leaves alone and what the simulator switches off are read from there.
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
    """The values that a part may have.

    Attributes:
        words: in words, for help and tables.
        check: takes the part's name and a value; raises SettingError, which names the value and what is allowed.
    """

    words: str
    check: Callable[[str, object], None]


@dataclasses.dataclass(frozen=True)
class Part:
    """What a field of ``Recipe`` says of itself.

    Attributes:
        values: what it may be.
        help: what it does, in a line.
        of_projection: whether it means something only where weights are projected. A user who sets such a part wants
            projection, so that the planner does not answer with full rank.
        simulated: its value in a simulated training, in which refreshes come when they are asked for and nothing else
            decides on one; UNSET to leave it as it is.
        one_graph: the only value with which torch.compile's backend works, which has one graph; UNSET for any.
    """

    values: Values
    help: str
    of_projection: bool = True
    simulated: Any = UNSET
    one_graph: Any = UNSET


def part(default: Any, values: Values, help: str, **settings: Any) -> Any:  # noqa: A002 - argparse's word
    """A field of ``Recipe`` with its declaration; ``settings`` are further fields of ``Part``."""
    return dataclasses.field(default=default, metadata={"part": Part(values, help, **settings)})


def parts_of(recipe: Any) -> dict[str, Part]:
    """The declared parts of a recipe or of its class, by name."""
    return {f.name: f.metadata["part"] for f in dataclasses.fields(recipe) if "part" in f.metadata}


def one_of(literal: Any, *, or_none: bool = False) -> Values:
    """The texts of a ``Literal``, and None where that is one."""
    texts = get_args(literal)
    told = ", ".join(texts) + (", or None" if or_none else "")

    def check(name: str, value: object) -> None:
        if value not in texts and not (or_none and value is None):
            raise SettingError(f"{name}={value!r} is not one of {told}")

    return Values(told, check)


def whole_number(least: int, *, none: str | None = None) -> Values:
    """An int from ``least`` on, or None, which ``none`` explains."""
    told = f"an int of at least {least}" + (f", or None for {none}" if none else "")

    def check(name: str, value: object) -> None:
        if none is not None and value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise SettingError(f"{name}={value!r} must be {told}")

    return Values(told, check)


def bits(*allowed: int) -> Values:
    """One of these numbers of bits, or None for the dtype of the weight."""
    told = f"{', '.join(map(str, allowed))}, or None for the weight's own dtype"

    def check(name: str, value: object) -> None:
        if value is not None and (value not in allowed or isinstance(value, bool)):
            raise SettingError(f"{name}={value!r} must be {told}")

    return Values(told, check)


def number(words: str, allows: Callable[[float], bool], *, or_none: bool = False) -> Values:
    """A finite number that ``allows`` accepts, as ``words`` says; or None."""

    def check(name: str, value: object) -> None:
        if or_none and value is None:
            return
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or not allows(value):  # type: ignore[arg-type]
            raise SettingError(f"{name}={value!r} must be {words}")

    return Values(f"{words}, or None" if or_none else words, check)


def positive(*, or_none: bool = False) -> Values:
    """A finite number above 0."""
    return number("a finite number above 0", lambda value: value > 0, or_none=or_none)


def flag() -> Values:
    """True or False."""

    def check(name: str, value: object) -> None:
        if not isinstance(value, bool):
            raise SettingError(f"{name}={value!r} must be True or False")

    return Values("True or False", check)


def rank_or_share() -> Values:
    """Columns of a basis as an int, or a fraction of the weight's shorter side."""

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
