"""The private parts of torch that galore_fx stands on, in one place (torch 2.11 to 2.13).

Everything else in the package uses public names only.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._inductor import compile_fx as _compile_fx
from torch._subclasses.fake_tensor import DataDependentOutputException as DataDependentOutput
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

F_LINEAR = torch._C._nn.linear

__all__ = [
    "F_LINEAR",
    "DataDependentOutput",
    "FakeTensor",
    "FakeTensorMode",
    "ShapeEnv",
    "compile_graph",
    "current_tracing_context",
    "dispatch_compiler",
    "optimizer_internals",
    "tracing",
]


def compile_graph(gm: fx.GraphModule, inputs: Sequence[object]) -> Callable[..., Any]:
    """AOTAutograd and Inductor on a torch-level graph; ``inputs`` may be fake."""
    return _compile_fx.compile_fx(gm, list(inputs))  # type: ignore[no-any-return, arg-type]


def current_tracing_context() -> TracingContext:
    """Dynamo's context while a backend runs: it owns the fake mode and the symbols of the graph."""
    context = TracingContext.try_get()
    assert context is not None, "a backend runs inside Dynamo's tracing context"
    return context


def dispatch_compiler(
    function: Callable[..., Any], backend: Callable[..., Any], *, recompile_limit: int
) -> Callable[..., Any]:
    """``torch.compile`` of one function, whole or not at all, with its own limit of recompilations."""
    compiled = torch.compile(function, backend=backend, fullgraph=True)

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

