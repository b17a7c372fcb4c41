"""Gives functions their own code objects, so that Dynamo counts and caches their entries separately."""

import itertools
import types
from collections.abc import Callable
from typing import Any

_NUMBERS = itertools.count()


def own_code_object(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that calls ``function`` and has a unique code object and name.

    The functions that ``function`` wraps are copied likewise. After a graph break in one of them Dynamo compiles its
    code, whose cache entries would otherwise be counted across all models of the class.

    The name must be unique because Dynamo records changing sizes by file, line and name. A second model with other
    sizes than the first would otherwise get symbolic sizes.
    """
    number = next(_NUMBERS)
    own = _own_copy(function, number)

    def region(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    return _own_copy(region, number)


def _own_copy(function: Callable[..., Any], number: int) -> Callable[..., Any]:
    if not isinstance(function, types.FunctionType):
        return function
    closure = function.__closure__
    wrapped = getattr(function, "__wrapped__", None)
    if closure and wrapped is not None:
        own = _own_copy(wrapped, number)
        closure = tuple(types.CellType(own) if _holds(cell, wrapped) else cell for cell in closure)
    code = function.__code__.replace(co_name=f"{function.__name__}_{number}")
    copy = types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__dict__.update(function.__dict__)
    return copy


def _holds(cell: types.CellType, value: object) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # empty
        return False
