"""Which block of a model runs, and which have saved activations, at each moment of a simulated step."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from galore_fx.passes.memory_plan.storage_counter import Moment, StorageCounter
from galore_fx.runtime.compatibility import in_backward, tree_leaves


@dataclasses.dataclass
class Call:
    """One forward of a block and its backward, as numbers of the counter's events.

    Attributes:
        block: index of the block.
        forward: its first event, and the first after it.
        backward: where its backward begins, None where it has none.
        end: where something else goes on after its backward.
    """

    block: int
    forward: tuple[int, int]
    backward: int | None = None
    end: int | None = None


class BlockCalls:
    """Notes when blocks run.

    Args:
        counter: the counter whose events are the clock.
    """

    def __init__(self, counter: StorageCounter) -> None:
        self.calls: list[Call] = []
        self._counter = counter
        self._running: Call | None = None

    def watch(self, block: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A forward that notes its calls; a backward begins when the gradient of an output is there."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            if in_backward():  # a checkpoint recomputes: it is a part of the backward that runs
                return forward(*args, **kwargs)
            start = self._counter.now
            out = forward(*args, **kwargs)
            call = Call(block, (start, self._counter.now))
            self.calls.append(call)

            def begin(_grad: Tensor) -> None:
                if call.backward is None:
                    self.end_backward()
                    call.backward = self._counter.now
                    self._running = call

            for value in tree_leaves(out):
                if isinstance(value, Tensor) and value.requires_grad:
                    value.register_hook(begin)
            return out

        return watched

    def end_backward(self) -> None:
        """The backward that runs is over."""
        if self._running is not None:
            self._running.end = self._counter.now
        self._running = None

    def take(self) -> list[Call]:
        """The calls since it was last asked."""
        taken, self.calls = self.calls, []
        return taken


@dataclasses.dataclass(frozen=True)
class Scene:
    """What goes on at one moment.

    Attributes:
        saving: blocks whose forward is over and whose backward has not begun, by call.
        running: the call that runs, None between blocks.
    """

    saving: tuple[int, ...]
    running: int | None


def scenes(calls: list[Call], moments: Iterable[Moment]) -> Iterator[tuple[Moment, Scene]]:
    """Each moment with what goes on at it; numbers of a scene are indices into ``calls``."""
    for moment in moments:
        now = moment.number
        saving = tuple(i for i, c in enumerate(calls) if c.backward is not None and c.forward[1] <= now < c.backward)
        running = next((i for i, c in enumerate(calls) if _runs(c, now)), None)
        yield moment, Scene(saving, running)


def _runs(call: Call, now: int) -> bool:
    forward = call.forward[0] <= now < call.forward[1]
    return forward or (call.backward is not None and call.end is not None and call.backward <= now < call.end)
