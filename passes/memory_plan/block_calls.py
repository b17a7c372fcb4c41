"""Records which block runs at each event of a simulated step, and which blocks hold saved or leftover tensors."""

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from galore_fx.passes.memory_plan.storage_counter import Moment, StorageCounter
from galore_fx.runtime.torch_private import in_backward, tree_leaves


@dataclasses.dataclass
class Call:
    """One forward of a block and its backward, as event numbers of the counter.

    Attributes:
        block: index of the block.
        number: number of earlier calls of this block in the step.
        forward: first event of the forward, and first event after it.
        backward: first event of the backward, and first event after it; None if there is no backward.
        settled: first event after the forward and backward of the whole model; 0 before.
        graph: graph that its forward ran.
    """

    block: int
    number: int
    forward: tuple[int, int]
    backward: tuple[int, int] | None = None
    settled: int = 0
    graph: object = None


@dataclasses.dataclass(frozen=True)
class Scene:
    """State of all calls at an event; calls are given by their index in the step.

    Attributes:
        running: the running call; None between blocks.
        runs_backward: whether the running call is in its backward.
        saving: calls with saved activations: the forward is over and the backward has not begun.
        done: finished calls; the gradients or the cache that they leave stay alive.
    """

    running: int | None
    runs_backward: bool
    saving: tuple[int, ...]
    done: tuple[int, ...]


class BlockCalls:
    """Records when blocks run.

    Args:
        counter: the counter whose events serve as the clock.
        graph: returns the graph that the last forward ran.
    """

    def __init__(self, counter: StorageCounter, graph: Callable[[], object]) -> None:
        self._counter = counter
        self._graph = graph
        self._calls: list[Call] = []
        self._running: tuple[Call, int] | None = None

    def watch(self, block: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a forward so that its calls are recorded; a backward begins when an output's gradient is ready."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            if in_backward():  # recomputation of a checkpoint, part of the running backward
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
        """Ends a forward and backward of the whole model."""
        self._end_backward()
        for call in self._calls:
            call.settled = call.settled or self._counter.now

    def take(self) -> list[Call]:
        """Returns and forgets the calls since the last ``take``."""
        taken, self._calls = self._calls, []
        return taken

    def _end_backward(self) -> None:
        if self._running is not None:
            call, start = self._running
            call.backward = start, self._counter.now
        self._running = None


def scene_at(calls: list[Call], moment: Moment) -> Scene:
    """Returns the state of these calls at an event of their step."""
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
