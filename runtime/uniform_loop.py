"""Loops with identical iterations, such as the slices of a large update; a simulation runs only some of them."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")
# Called with the number of iterations that the following one represents, and with 1 after it.
OnWeight = Callable[[int], None]
_PLAYING: list[OnWeight] = []


def alike(items: Sequence[Item]) -> Iterable[Item]:
    """Returns the items of a loop whose iterations all allocate and free the same; the last may use less.

    In a simulation a loop of more than three items yields only the first, a representative of the middle and the last.
    """
    if not _PLAYING or len(items) <= 3:
        return items
    return _some_of(items, _PLAYING[-1])


def _some_of(items: Sequence[Item], on_weight: OnWeight) -> Iterator[Item]:
    """Yields the first item, the second as the representative of all middle ones, and the last."""
    yield items[0]
    on_weight(len(items) - 2)
    yield items[1]
    on_weight(1)
    yield items[-1]


@contextlib.contextmanager
def playing_some(on_weight: OnWeight) -> Iterator[None]:
    """Context in which ``alike`` skips iterations and reports to ``on_weight`` how many the yielded one represents."""
    _PLAYING.append(on_weight)
    try:
        yield
    finally:
        _PLAYING.pop()
