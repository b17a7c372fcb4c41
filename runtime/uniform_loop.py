"""Loops whose turns are all alike, such as the slices of a large update: a simulation need not play each of them."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")
# Called with what happens from now on so many times, and with 1 when that is over.
OnWeight = Callable[[int], None]
_PLAYING: list[OnWeight] = []


def alike(items: Sequence[Item]) -> Iterable[Item]:
    """The items of a loop whose turns allocate and free the same, the last perhaps less; in a simulation only some."""
    if not _PLAYING or len(items) <= 3:
        return items
    return _some_of(items, _PLAYING[-1])


def _some_of(items: Sequence[Item], on_weight: OnWeight) -> Iterator[Item]:
    """The first, the second in the place of all between, and the last."""
    yield items[0]
    on_weight(len(items) - 2)
    yield items[1]
    on_weight(1)
    yield items[-1]


@contextlib.contextmanager
def playing_some(on_weight: OnWeight) -> Iterator[None]:
    """Within it, ``alike`` leaves turns out, and says for how many one of them stands."""
    _PLAYING.append(on_weight)
    try:
        yield
    finally:
        _PLAYING.pop()
