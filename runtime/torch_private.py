"""Collects all private torch APIs that galore_fx depends on (torch 2.11 to 2.13).

The rest of the package uses public names, with three exceptions: underscored methods that torch calls on its classes
(``nn.Module._apply``, ``_load_from_state_dict``, ``Optimizer._step_supports_amp_scaling``), the ``_version`` of a
tensor, and hooks (``foreign_hooks.py``).
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
    """Returns the backend name and the options with which ``torch.compile`` compiled a module.

    Returns:
        (name, options); (None, None) for a module that ``torch.compile`` did not return.
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
    """Compiles a torch-level graph with AOTAutograd and Inductor.

    Args:
        gm: the graph.
        inputs: example inputs, which may be fake.
        activation_budget: memory budget of the partitioner, as ``torch._functorch.config.activation_memory_budget``.
        on_backward: changes the backward graph in place before Inductor compiles it.

    Returns:
        The compiled function.
    """

    def compile_inner(graph: fx.GraphModule, examples: Any, **settings: Any) -> Any:
        if on_backward is not None and settings.get("is_backward"):
            on_backward(graph)
        # The key of Inductor's disk cache covers the graph but not which saved tensors the backward may overwrite.
        tag = f"{compiler_config.cache_key_tag}, may write over {_donated_inputs()}"
        with compiler_config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
            return _compile_fx.compile_fx_inner(graph, examples, **settings)

    with functorch_config.patch(activation_memory_budget=activation_budget):
        return _compile_fx.compile_fx(gm, list(inputs), inner_compile=compile_inner)  # type: ignore[return-value, arg-type]


def compiler_settings() -> tuple[object, ...]:
    """Returns the process settings that affect a compiled graph but are not guarded by Dynamo for our graphs.

    Whether a backward may overwrite saved tensors (if off, a second backward through one graph is allowed), whether
    Inductor uses torch's random generator, whether operations must be deterministic (and only warn), the matmul
    precision, and the number of threads.
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
    """Returns the indices of saved tensors that the backward being compiled may overwrite, as its last reader."""
    context = TracingContext.try_get()
    metadata = context.fw_metadata if context is not None else None
    return list(getattr(metadata, "bw_donated_idxs", None) or [])


below_autograd = torch._C._AutoDispatchBelowAutograd


def accumulates(leaf: torch.Tensor) -> bool:
    """Returns whether the running backward accumulates into a leaf's ``.grad``; ``torch.autograd.grad`` does not."""
    try:
        return bool(torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(leaf).node))
    except RuntimeError:  # the leaf is an input of torch.autograd.grad
        return False


def saves_elsewhere() -> bool:
    """Returns whether saved-tensor hooks are active, which may unpack other tensors than were packed."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def current_tracing_context() -> TracingContext:
    """Returns Dynamo's context while a backend runs; it owns the fake mode and the symbols of the graph."""
    context = TracingContext.try_get()
    assert context is not None, "a backend runs inside Dynamo's tracing context"
    return context


# Guards that Dynamo skips by default: hooks on modules, and aliasing among parameters.
_GUARDED = {"skip_nnmodule_hook_guards": False, "skip_no_tensor_aliasing_guards_on_parameters": False}


def dispatch_compiler(
    function: Callable[..., Any], backend: Callable[..., Any], *, recompile_limit: int, whole: bool = True
) -> Callable[..., Any]:
    """Compiles one function with ``torch.compile`` and its own recompilation limit.

    Messages that a model logs once, such as transformers' notice of a default loss, are dropped; otherwise they would
    break the graph.

    Args:
        function: the function.
        backend: the Dynamo backend.
        recompile_limit: limit of recompilations of this function.
        whole: require a single graph (``fullgraph``).
    """
    compiled = torch.compile(function, backend=backend, fullgraph=whole)

    def call(*args: Any, **kwargs: Any) -> Any:
        limits = {"recompile_limit": recompile_limit, "accumulated_recompile_limit": max(256, recompile_limit)}
        with (
            _dynamo_settings(**limits, **_GUARDED, ignore_logging_functions=_logged_once()),
            _loggable_settings(),
            idle_collector() if whole else contextlib.nullcontext(),  # otherwise code between the graphs may collect
        ):
            return compiled(*args, **kwargs)

    return call


def compile_for_any_length(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function with symbolic sizes, keeping the float attributes of modules constant.

    Dynamo would otherwise make them symbols, whose guards torch 2.11 cannot evaluate on fake tensors.
    """
    compiled = torch.compile(function, fullgraph=True, dynamic=True)

    def call(*args: Any) -> Any:
        with _dynamo_settings(specialize_float=True), _BITCASTS_IN_REGISTERS:
            return compiled(*args)

    return call


class _BitcastsInRegisters:
    """Context in which Inductor's C++ code bitcasts whole vectors instead of single elements through memory.

    This halves the time of a kernel that rounds stochastically. The results are identical.
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


# Inductor finds the scalar version of a vector operation by its name.
_vector_bitcast.__name__ = "to_dtype_bitcast"


def num_captured_graphs() -> int:
    """Returns the number of graphs that Dynamo has captured so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _logged_once() -> set[Callable[..., Any]]:
    names = ("warning_once", "info_once")
    return {getattr(logging.Logger, name) for name in names if hasattr(logging.Logger, name)}


def _loggable_settings() -> contextlib.AbstractContextManager[Any]:
    """Disables the logging of Dynamo's settings where it fails: torch 2.11 cannot log a set of functions."""
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
    """Returns whether autograd's engine runs on this thread, as it does when a checkpoint recomputes."""
    return torch._C._current_graph_task_id() != -1


def tensor_use_count(tensor: torch.Tensor) -> int:
    """Returns the number of C++ references to a tensor."""
    return int(tensor._use_count())  # type: ignore[attr-defined]


def storage_use_count(tensor: torch.Tensor) -> int:
    """Returns the number of C++ references to the storage of a tensor."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


def size_hint(size: int | torch.SymInt) -> int:
    """Returns a size; for a symbolic size, its value at capture."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else size


def refuse_unsupported_modes() -> None:
    """Rejects torch modes under which a compiled block would be wrong.

    Raises:
        SettingError: compiled autograd or Inductor's CUDA graphs are on; the message names the mode.
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
    """Returns a copy of an optimizer's instance attributes, from which a second one is built around traced values."""
    return dict(optimizer.__dict__)


# Messages of libkineto and the CPU allocator on stderr during memory profiling; users cannot act on them.
_PROFILER_CHATTER = ("SyncActivityProfilerHandler", "was allocated before the profiling started")


@contextlib.contextmanager
def quiet_profiler() -> Iterator[None]:
    """Context that filters the C++ messages of the profiler from stderr; all other lines are written on exit."""
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
    """Returns torch's multi-head attention, copied to apply its weights with ``linear``, and torch's own linear."""
    functional = torch.nn.functional
    # No override of the whole attention may be dispatched: the weights passed to ``linear`` need not be tensors.
    names: dict[str, Any] = {**vars(functional), "linear": linear, "has_torch_function": lambda _: False}
    for name in ("_in_projection", "_in_projection_packed", "multi_head_attention_forward"):
        original = getattr(functional, name)
        names[name] = types.FunctionType(original.__code__, names, name, original.__defaults__, original.__closure__)
    return names["multi_head_attention_forward"], functional.linear


def memory_events(profiler: profile) -> list[tuple[int, int]]:
    """Returns (time in ns, bytes) of every CPU allocation (positive) and release (negative), in order of time."""
    events: list[Any] = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]" and e.device_index() == -1]
    return sorted(changes, key=lambda change: change[0])


def condition_of(guards: Sequence[sympy.Basic], symbols: Sequence[sympy.Symbol]) -> Callable[[tuple[float, ...]], bool]:
    """Returns the conjunction of ShapeEnv guards as a function of the symbols' values, in the given order."""
    printed = " and ".join(f"({PythonPrinter().doprint(guard)})" for guard in guards) or "True"
    names = ", ".join(str(symbol) for symbol in symbols)
    return eval(f"lambda values: (lambda {names}: {printed})(*values)", {"math": math})  # type: ignore[no-any-return]
