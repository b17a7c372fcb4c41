"""Which block of a model runs at each moment of a simulated step, and which have saved or left something."""

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from galore_fx.passes.memory_plan.storage_counter import Moment, StorageCounter
from galore_fx.runtime.torch_private import in_backward, tree_leaves


@dataclasses.dataclass
class Call:
    """One forward of a block and its backward, as numbers of the counter's events.

    Attributes:
        block: index of the block.
        number: how many calls of this block came before it in the step.
        forward: its first event, and the first after it.
        backward: the same of its backward; None where it has none.
        settled: the first event after the forward and backward of the whole model.
        graph: what its forward ran as.
    """

    block: int
    number: int
    forward: tuple[int, int]
    backward: tuple[int, int] | None = None
    settled: int = 0
    graph: object = None


@dataclasses.dataclass(frozen=True)
class Scene:
    """What goes on at a moment; calls are given by their index in the step.

    Attributes:
        running: the call that runs, None between blocks.
        runs_backward: whether that is its backward.
        saving: calls whose activations are saved: the forward is over and the backward has not begun.
        done: calls that are over; what they have left, gradients or a cache, stays.
    """

    running: int | None
    runs_backward: bool
    saving: tuple[int, ...]
    done: tuple[int, ...]


class BlockCalls:
    """Notes when blocks run.

    Args:
        counter: the counter whose events are the clock.
        graph: tells as what the last forward ran.
    """

    def __init__(self, counter: StorageCounter, graph: Callable[[], object]) -> None:
        self._counter = counter
        self._graph = graph
        self._calls: list[Call] = []
        self._running: tuple[Call, int] | None = None

    def watch(self, block: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A forward that notes its calls; a backward begins when the gradient of an output is there."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            if in_backward():  # a checkpoint recomputes: it is a part of the backward that runs
                return forward(*args, **kwargs)
            start = self._counter.now
            out = forward(*args, **kwargs)
            number = sum(call.block == block for call in self._calls)
            call = Call(block, number, (start, self._counter.now), graph=self._graph())
            self._calls.append(call)

            def begin(_grad: Tensor) -> None:
                if call.backward is None and (self._running is None or self._running[0] is not call):
                    self._end_backward()
                    self._running = call, self._counter.now

            for value in tree_leaves(out):
                if isinstance(value, Tensor) and value.requires_grad:
                    value.register_hook(begin)
            return out

        return watched

    def settle(self) -> None:
        """A forward and backward of the whole model is over."""
        self._end_backward()
        for call in self._calls:
            call.settled = call.settled or self._counter.now

    def take(self) -> list[Call]:
        """The calls since it was last asked."""
        taken, self._calls = self._calls, []
        return taken

    def _end_backward(self) -> None:
        if self._running is not None:
            call, start = self._running
            call.backward = start, self._counter.now
        self._running = None


def scene_at(calls: list[Call], moment: Moment) -> Scene:
    """What goes on at a moment of a step with these calls."""
    now, running, runs_backward = moment.number, None, False
    saving, done = [], []
    for index, call in enumerate(calls):
        if call.forward[0] <= now < call.forward[1]:
            running = index
        elif call.backward is not None and call.backward[0] <= now < call.backward[1]:
            running, runs_backward = index, True
        elif call.backward is not None and call.forward[1] <= now < call.backward[0]:
            saving.append(index)
        elif now >= call.forward[1]:
            done.append(index)
    return Scene(running, runs_backward, tuple(saving), tuple(done))
