"""The private parts of torch that galore_fx stands on, in one place (torch 2.11 to 2.13).

Everything else in the package uses public names, but for methods that torch calls on its classes by underscored names
(``nn.Module._apply``, ``_load_from_state_dict``, ``Optimizer._step_supports_amp_scaling``), a tensor's ``_version``,
and hooks (``foreign_hooks.py``).
"""

import contextlib
import functools
import logging
import math
import os
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import sympy
import torch
from torch import fx
from torch._dynamo import compiled_autograd as _compiled_autograd
from torch._dynamo.eval_frame import innermost_backend
from torch._dynamo.exc import TorchDynamoException as DynamoError
from torch._functorch import config as functorch_config
from torch._guards import TracingContext, tracing
from torch._inductor import compile_fx as _compile_fx
from torch._inductor.codegen.cpp import CppVecOverrides
from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import DataDependentOutputException as DataDependentOutput
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.compiler import config as compiler_config
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as outside_all_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils._sympy.printers import PythonPrinter
from torch.utils.weak import WeakTensorKeyDictionary

from galore_fx.errors import SettingError
from galore_fx.runtime.foreign_hooks import idle_collector

F_LINEAR = torch._C._nn.linear

__all__ = [
    "F_LINEAR",
    "DataDependentOutput",
    "DynamoError",
    "FakeCopyMode",
    "FakeTensor",
    "FakeTensorMode",
    "ShapeEnv",
    "TorchDispatchMode",
    "WeakTensorKeyDictionary",
    "accumulates",
    "attention_with_linear",
    "backend_settings",
    "below_autograd",
    "compile_graph",
    "compiler_settings",
    "condition_of",
    "current_tracing_context",
    "dispatch_compiler",
    "in_backward",
    "memory_events",
    "optimizer_internals",
    "num_captured_graphs",
    "outside_all_modes",
    "quiet_profiler",
    "refuse_unsupported_modes",
    "saves_elsewhere",
    "size_hint",
    "storage_use_count",
    "tensor_use_count",
    "tracing",
    "tree_leaves",
    "tree_map",
]


def backend_settings(model: torch.nn.Module) -> tuple[str | None, dict[str, Any] | None]:
    """Name of the backend and the options that a module was given to ``torch.compile`` with.

    Returns:
        (None, None) for a module that is not what ``torch.compile`` returns.
    """
    context = getattr(model, "dynamo_ctx", None)
    if context is None:
        return None, None
    backend: Any = innermost_backend(context.callback)
    name = getattr(backend, "compiler_name", None) or getattr(backend, "__name__", str(backend))
    return name, dict(getattr(backend, "kwargs", {}).get("options") or {})


def compile_graph(
    gm: fx.GraphModule,
    inputs: Sequence[object],
    activation_budget: float = 1.0,
    on_backward: Callable[[fx.GraphModule], None] | None = None,
) -> Callable[..., Any]:
    """AOTAutograd and Inductor on a torch-level graph.

    Args:
        gm: the graph.
        inputs: examples of its inputs, which may be fake.
        activation_budget: what the partitioner may save, as of ``torch._functorch.config.activation_memory_budget``.
        on_backward: changes the backward's graph in place before Inductor gets it.
    """

    def compile_inner(graph: fx.GraphModule, examples: Any, **settings: Any) -> Any:
        if on_backward is not None and settings.get("is_backward"):
            on_backward(graph)
        # Inductor's cache on disk knows the graph, and not which saved tensors the backward may write over.
        tag = f"{compiler_config.cache_key_tag}, may write over {_donated_inputs()}"
        with compiler_config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
            return _compile_fx.compile_fx_inner(graph, examples, **settings)

    with functorch_config.patch(activation_memory_budget=activation_budget):
        return _compile_fx.compile_fx(gm, list(inputs), inner_compile=compile_inner)  # type: ignore[return-value, arg-type]


def compiler_settings() -> tuple[object, ...]:
    """The settings of the process that a compiled graph was built on and that Dynamo guards no graph of ours by.

    Whether a backward may write over saved tensors (off, a second backward through one graph is allowed), whether
    operations must be deterministic, and how products are rounded and split over threads.
    """
    return (
        functorch_config.donated_buffer,
        torch._inductor.config.fallback_random,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
    )


def _donated_inputs() -> list[int]:
    """Of the backward that is being compiled: saved tensors that nobody reads after it, which its kernels reuse."""
    context = TracingContext.try_get()
    metadata = context.fw_metadata if context is not None else None
    return list(getattr(metadata, "bw_donated_idxs", None) or [])


below_autograd = torch._C._AutoDispatchBelowAutograd


def accumulates(leaf: torch.Tensor) -> bool:
    """Whether the backward that runs on this thread adds to a leaf's gradient, as ``torch.autograd.grad`` does not."""
    try:
        return bool(torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(leaf).node))
    except RuntimeError:  # what torch.autograd.grad was asked for
        return False


def saves_elsewhere() -> bool:
    """Whether hooks on saved tensors are active, which may give others back than were saved."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def current_tracing_context() -> TracingContext:
    """Dynamo's context while a backend runs: it owns the fake mode and the symbols of the graph."""
    context = TracingContext.try_get()
    assert context is not None, "a backend runs inside Dynamo's tracing context"
    return context


# What Dynamo takes to stay as it is unless it is told otherwise: hooks on modules, and which parameters are one tensor.
_GUARDED = {"skip_nnmodule_hook_guards": False, "skip_no_tensor_aliasing_guards_on_parameters": False}


def dispatch_compiler(
    function: Callable[..., Any], backend: Callable[..., Any], *, recompile_limit: int, whole: bool = True
) -> Callable[..., Any]:
    """``torch.compile`` of one function with its own limit of recompilations; ``whole``: as one graph or not at all.

    A message that the model logs once, like transformers' about a default loss, does not break the graph: it is left
    out.
    """
    compiled = torch.compile(function, backend=backend, fullgraph=whole)

    def call(*args: Any, **kwargs: Any) -> Any:
        limits = {"recompile_limit": recompile_limit, "accumulated_recompile_limit": max(256, recompile_limit)}
        with (
            _dynamo_settings(**limits, **_GUARDED, ignore_logging_functions=_logged_once()),
            _loggable_settings(),
            idle_collector() if whole else contextlib.nullcontext(),  # else what runs in between may collect
        ):
            return compiled(*args, **kwargs)

    return call


def compile_for_any_length(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` of a function with symbolic sizes whose modules' floats are constants.

    Dynamo makes symbols of them otherwise, whose guards torch 2.11 cannot evaluate on fake tensors.
    """
    compiled = torch.compile(function, fullgraph=True, dynamic=True)

    def call(*args: Any) -> Any:
        with _dynamo_settings(specialize_float=True), _BITCASTS_IN_REGISTERS:
            return compiled(*args)

    return call


class _BitcastsInRegisters:
    """Within it Inductor's C++ casts the bits of whole vectors, and not element by element through memory.

    That halves the time of a kernel that rounds stochastically; the numbers are the same.
    """

    def __enter__(self) -> None:
        CppVecOverrides.to_dtype_bitcast = staticmethod(_vector_bitcast)  # type: ignore[method-assign]

    def __exit__(self, *_error: object) -> None:
        CppVecOverrides.to_dtype_bitcast = _ELEMENTWISE_BITCAST  # type: ignore[method-assign]


_ELEMENTWISE_BITCAST: Any = vars(CppVecOverrides)["to_dtype_bitcast"]
_BITCASTS_IN_REGISTERS = _BitcastsInRegisters()


def _vector_bitcast(x: Any, dtype: torch.dtype, src_dtype: torch.dtype) -> Any:
    count, before = (V.kernel._get_num_vectors(each) for each in (dtype, src_dtype))
    if count != before or dtype.itemsize != src_dtype.itemsize:
        return _ELEMENTWISE_BITCAST.__func__(x, dtype, src_dtype)
    element = DTYPE_TO_CPP[dtype]
    vector = f"at::vec::VectorizedN<{element}, {count}>" if count > 1 else f"at::vec::Vectorized<{element}>"
    copied = f"std::memcpy(static_cast<void*>(&out), static_cast<const void*>(&{x}), sizeof(out));"
    return f"[&]() {{ {vector} out; {copied} return out; }}()"


# Inductor looks up what runs on numbers, not vectors, by the name of what runs on vectors.
_vector_bitcast.__name__ = "to_dtype_bitcast"


def num_captured_graphs() -> int:
    """How many graphs Dynamo has captured so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _logged_once() -> set[Callable[..., Any]]:
    names = ("warning_once", "info_once")
    return {getattr(logging.Logger, name) for name in names if hasattr(logging.Logger, name)}


def _loggable_settings() -> contextlib.AbstractContextManager[Any]:
    """torch 2.11 logs its settings after each compilation, and reports an error where there is a set of functions."""
    if _can_log_settings():
        return contextlib.nullcontext()
    return mock.patch.object(torch._dynamo.utils, "_get_dynamo_config_for_logging", lambda: None)


@functools.cache
def _can_log_settings() -> bool:
    try:
        torch._dynamo.utils._get_dynamo_config_for_logging()
    except TypeError:
        return False
    return True


@contextlib.contextmanager
def _dynamo_settings(**settings: Any) -> Iterator[None]:
    config = torch._dynamo.config
    before = {name: getattr(config, name) for name in settings}
    for name, value in settings.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def in_backward() -> bool:
    """Whether autograd's engine is running on this thread, as it is when a checkpoint recomputes."""
    return torch._C._current_graph_task_id() != -1


def tensor_use_count(tensor: torch.Tensor) -> int:
    """References to a tensor in C++."""
    return int(tensor._use_count())  # type: ignore[attr-defined]


def storage_use_count(tensor: torch.Tensor) -> int:
    """References to a tensor's storage in C++."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


def size_hint(size: int | torch.SymInt) -> int:
    """A size, or the value that a symbolic one had when it was captured."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else size


def refuse_unsupported_modes() -> None:
    """Raises where the process runs torch in a mode under which a compiled block would be wrong.

    Raises:
        SettingError: compiled autograd, or Inductor's CUDA graphs; names it.
    """
    autograd = torch._dynamo.config.compiled_autograd or _compiled_autograd.compiled_autograd_enabled
    if autograd:
        raise SettingError(
            "compiled autograd is on (torch._dynamo.config.compiled_autograd or torch._dynamo.compiled_autograd), which"
            " galore_fx does not support: it would trace the hooks that hand over projected gradients. Switch it off"
        )
    if torch._inductor.config.triton.cudagraphs:
        raise SettingError(
            "CUDA graphs are on (torch._inductor.config.triton.cudagraphs), which galore_fx does not support: "
            "gradients and bases would have to stay at fixed addresses. Switch them off"
        )


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


def attention_with_linear(linear: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A copy of torch's multi-head attention that multiplies by its weights with ``linear``, and torch's own linear."""
    functional = torch.nn.functional
    # Not to be taken for an operation as a whole: what ``linear`` gets need not be a tensor.
    names: dict[str, Any] = {**vars(functional), "linear": linear, "has_torch_function": lambda _: False}
    for name in ("_in_projection", "_in_projection_packed", "multi_head_attention_forward"):
        original = getattr(functional, name)
        names[name] = types.FunctionType(original.__code__, names, name, original.__defaults__, original.__closure__)
    return names["multi_head_attention_forward"], functional.linear


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
