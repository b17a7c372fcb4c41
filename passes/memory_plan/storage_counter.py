"""Counts the storages of fake tensors as they are allocated and freed, each under a category.

A storage lives from the operation that allocates it until its last tensor is deleted. With fake tensors that happens at
the same line of the same Python code as in the real run.
"""

import contextlib
import dataclasses
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_fx.runtime.torch_private import (
    FakeTensor,
    TorchDispatchMode,
    storage_use_count,
    tensor_use_count,
    tree_leaves,
)

Scratch = Callable[[Any, Sequence[Any], Mapping[str, Any]], int]
Cost = Callable[[Any, Sequence[Any], Mapping[str, Any], Any], float]


@dataclasses.dataclass
class Allocation:
    """One storage.

    Attributes:
        num_bytes: its size.
        phase: phase of the step in which it was allocated.
        category: its use, such as "activations" or "workspace".
        made: number of the event that allocated it.
        freed: number of the event that freed it; None while it lives.
        padding: bytes that the allocator adds to it.
    """

    num_bytes: int
    phase: str
    category: str
    made: int
    freed: int | None = None
    padding: int = 0


@dataclasses.dataclass(frozen=True)
class Moment:
    """Bytes alive after one event.

    Attributes:
        phase: phase of the event.
        categories: bytes by category.
        number: number of the event.
    """

    phase: str
    categories: dict[str, int]
    number: int

    @property
    def total(self) -> int:
        """Total bytes alive."""
        return sum(self.categories.values())


class StorageCounter(TorchDispatchMode):
    """While active, tracks every storage that an operation on fake tensors allocates.

    Attributes:
        costs: (event number, phase, seconds) of each operation.
        allocations: all storages since the last ``forget``.

    Args:
        scratch: returns the bytes that an operation uses while it runs, from the operation and its arguments.
        cost: returns the seconds that an operation takes, from the operation, its arguments and its result.
        granularity: allocations are rounded up to multiples of this many bytes.
    """

    def __init__(self, scratch: Scratch | None = None, cost: Cost | None = None, granularity: int = 1) -> None:
        super().__init__()
        self._granularity = granularity
        self._scratch = scratch
        self._cost = cost
        self.costs: list[tuple[int, str, float]] = []
        self._weight = 1  # number of executions that each operation now represents
        self._own: list[tuple[int, ...]] | _Unknown | None = None
        self.allocations: list[Allocation] = []
        self._alive: dict[int, tuple[Any, Allocation]] = {}
        self._phases: list[str] = []
        self._phase, self._category = "", ""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Returns True, so that Dynamo compiles under this mode instead of skipping the frame."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the operation and records the storages of its results, its scratch and its time."""
        if func is torch.ops.aten.add.Tensor and _from_the_engine(sys._getframe(1)):
            summed = self._summed_in_place(*args)
            if summed is not None:
                return summed
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, FakeTensor):
                self._note(value)
        if self._scratch is not None:
            num_bytes = self._scratch(func, args, kwargs or {})
            if num_bytes:
                made = self._event()
                self.allocations.append(Allocation(num_bytes, self._phase, "workspace", made, self._event()))
        if self._cost is not None:
            self.spend(self._cost(func, args, kwargs or {}, out))
        return out

    def spend(self, seconds: float) -> None:
        """Records time that passes in the current phase."""
        if seconds:
            self.costs.append((len(self._phases), self._phase, seconds * self._weight))

    def repeat(self, weight: int) -> None:
        """Counts the time of the following operations ``weight`` times."""
        self._weight = weight

    def forget(self) -> None:
        """Drops the records of all events so far; live storages stay tracked."""
        self.allocations, self.costs = [], []

    def learn_sums(self) -> None:
        """Learns the reference counts of a gradient that only the engine holds; called once, with the mode active.

        The engine adds two gradients of one tensor in place if it holds the only reference, but not under a mode. The
        mode adds references of its own, so the counts are read from a sum of gradients that only the engine holds.
        """
        x = torch.zeros(2, requires_grad=True)
        self._own = _Unknown()
        (_Fresh.apply(x) + _Fresh.apply(x)).backward()

    def _summed_in_place(self, first: Tensor, second: Tensor) -> Tensor | None:
        looks = [_references(first), _references(second)]
        if isinstance(self._own, _Unknown):
            self._own = looks
        for own, look, kept, other in zip(self._own or [], looks, (first, second), (second, first), strict=False):
            if look == own and kept.shape == other.shape and kept.dtype == other.dtype:
                return kept.add_(other)
        return None

    @contextlib.contextmanager
    def within(self, phase: str, category: str) -> Iterator[None]:
        """Context in which allocations belong to this phase and, unless claimed otherwise, to this category."""
        before = self._phase, self._category
        self._phase, self._category = phase, category
        try:
            yield
        finally:
            self._phase, self._category = before

    @contextlib.contextmanager
    def category(self, category: str) -> Iterator[None]:
        """Context in which allocations belong to this category; the phase does not change."""
        with self.within(self._phase, category):
            yield

    @property
    def now(self) -> int:
        """Number of the next event."""
        return len(self._phases)

    def claim(self, tensors: Iterable[Tensor], category: str) -> None:
        """Moves the storages of existing tensors to this category."""
        for tensor in tensors:
            found = self._alive.get(id(tensor.untyped_storage()))
            if found is not None:
                found[1].category = category

    def moments(self, start: int, end: int) -> list[Moment]:
        """Returns the bytes alive after each event in [start, end), of all storages allocated in this span."""
        changes: list[tuple[int, Allocation, int]] = []
        for allocation in self.allocations:
            if start <= allocation.made < end:
                changes.append((allocation.made, allocation, 1))
                if allocation.freed is not None and allocation.freed < end:
                    changes.append((allocation.freed, allocation, -1))
        alive: dict[str, int] = {}
        found = []
        for number, allocation, sign in sorted(changes, key=lambda change: change[0]):
            _add(alive, allocation, sign)
            found.append(Moment(self._phases[number], dict(alive), number))
        return found

    def alive_at(self, end: int, made: tuple[int, int]) -> dict[str, int]:
        """Returns bytes by category of storages allocated in the event span ``made`` and alive before event ``end``."""
        found: dict[str, int] = {}
        for a in self.allocations:
            if made[0] <= a.made < made[1] and (a.freed is None or a.freed >= end):
                _add(found, a, 1)
        return found

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._alive:
            return
        num_bytes = storage.nbytes()
        padding = -num_bytes % self._granularity
        allocation = Allocation(num_bytes, self._phase, self._category, self._event(), padding=padding)
        self.allocations.append(allocation)
        self._alive[key] = weakref.ref(storage, self._freeing(key)), allocation

    def _freeing(self, key: int) -> Callable[[Any], None]:
        def free(_storage: Any) -> None:
            found = self._alive.pop(key, None)
            if found is not None:
                found[1].freed = self._event()

        return free

    def _event(self) -> int:
        self._phases.append(self._phase)
        return len(self._phases) - 1


def _add(sizes: dict[str, int], allocation: Allocation, sign: int) -> None:
    sizes[allocation.category] = sizes.get(allocation.category, 0) + sign * allocation.num_bytes
    if allocation.padding:
        sizes["rounding"] = sizes.get("rounding", 0) + sign * allocation.padding


class _Unknown:
    """Marks reference counts that are being learnt."""


class _Fresh(torch.autograd.Function):
    """A function whose gradient is a new tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sum()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return torch.zeros(2)


def _references(tensor: Tensor) -> tuple[int, ...]:
    return sys.getrefcount(tensor), tensor_use_count(tensor), storage_use_count(tensor)


def _from_the_engine(frame: types.FrameType | None) -> bool:
    """Returns whether the nearest frames, torch's wrappers of a mode, were called directly by autograd's engine."""
    for _ in range(_NUM_WRAPPERS):
        if frame is None:
            return False
        if frame.f_code.co_name == "_engine_run_backward":
            return True
        frame = frame.f_back
    return False


_NUM_WRAPPERS = 3
