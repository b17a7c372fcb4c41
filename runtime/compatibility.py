"""The private parts of torch that galore_fx stands on, in one place (torch 2.11 to 2.13).

Everything else in the package uses public names only.
"""

import contextlib
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._dynamo.exc import TorchDynamoException as DynamoError
from torch._guards import TracingContext, tracing
from torch._inductor import compile_fx as _compile_fx
from torch._subclasses.fake_tensor import DataDependentOutputException as DataDependentOutput
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.profiler import profile
from torch.utils._pytree import tree_map
from torch.utils._sympy.printers import PythonPrinter

F_LINEAR = torch._C._nn.linear

__all__ = [
    "F_LINEAR",
    "DataDependentOutput",
    "DynamoError",
    "FakeTensor",
    "FakeTensorMode",
    "ShapeEnv",
    "compile_graph",
    "condition_of",
    "current_tracing_context",
    "dispatch_compiler",
    "memory_events",
    "optimizer_internals",
    "quiet_profiler",
    "tracing",
    "tree_map",
]


def compile_graph(gm: fx.GraphModule, inputs: Sequence[object]) -> Callable[..., Any]:
    """AOTAutograd and Inductor on a torch-level graph; ``inputs`` may be fake."""
    return _compile_fx.compile_fx(gm, list(inputs))  # type: ignore[return-value, arg-type]


def current_tracing_context() -> TracingContext:
    """Dynamo's context while a backend runs: it owns the fake mode and the symbols of the graph."""
    context = TracingContext.try_get()
    assert context is not None, "a backend runs inside Dynamo's tracing context"
    return context


def dispatch_compiler(
    function: Callable[..., Any], backend: Callable[..., Any], *, recompile_limit: int, whole: bool = True
) -> Callable[..., Any]:
    """``torch.compile`` of one function with its own limit of recompilations; ``whole``: as one graph or not at all."""
    compiled = torch.compile(function, backend=backend, fullgraph=whole)

    def call(*args: Any, **kwargs: Any) -> Any:
        with _recompile_limit(recompile_limit):
            return compiled(*args, **kwargs)

    return call


@contextlib.contextmanager
def _recompile_limit(limit: int) -> Iterator[None]:
    config = torch._dynamo.config
    before = config.recompile_limit
    config.recompile_limit = limit
    try:
        yield
    finally:
        config.recompile_limit = before


def optimizer_internals(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The instance attributes of an optimizer, to build a second one around traced values."""
    return dict(optimizer.__dict__)


# What libkineto and the CPU allocator write to the process's stderr when memory is profiled: nothing a user can act on.
_PROFILER_CHATTER = ("SyncActivityProfilerHandler", "was allocated before the profiling started")


@contextlib.contextmanager
def quiet_profiler() -> Iterator[None]:
    """Keeps the profiler's own lines off stderr (they are written by C++); everything else is passed on afterwards."""
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)
            caught.seek(0)
            for line in caught.read().decode(errors="replace").splitlines(keepends=True):
                if not any(text in line for text in _PROFILER_CHATTER):
                    sys.stderr.write(line)


def memory_events(profiler: profile) -> list[tuple[int, int]]:
    """(time in ns, bytes) of every allocation (positive) and release (negative) on the CPU, in the order of time."""
    events: list[Any] = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]" and e.device_index() == -1]
    return sorted(changes, key=lambda change: change[0])


def condition_of(guards: Sequence[sympy.Basic], symbols: Sequence[sympy.Symbol]) -> Callable[[tuple[float, ...]], bool]:
    """Guards of a ShapeEnv as one Python function of the symbols' values, given in order."""
    printed = " and ".join(f"({PythonPrinter().doprint(guard)})" for guard in guards) or "True"
    names = ", ".join(str(symbol) for symbol in symbols)
    return eval(f"lambda values: (lambda {names}: {printed})(*values)", {"math": math})  # type: ignore[no-any-return]
