"""Simulates Inductor without compiling: lowers and schedules a graph and runs its wrapper on fake tensors.

Inductor's scheduler and memory planning decide when each buffer is allocated, reused and freed; the generated Python
wrapper follows them line by line. Inside ``lowering_only`` it runs with empty kernels and fake allocations. No C++ or
Triton is compiled.

The patched names are private to Inductor (torch 2.11 to 2.13); they are patched only within the context.
"""

import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor import cpu_vec_isa
from torch._inductor.graph import GraphLowering

from galore_fx.passes.memory_plan.triton_schedule import KERNEL, scheduled_for_triton


@contextlib.contextmanager
def lowering_only(on_kernel: Callable[[Sequence[Any]], None], *, for_cuda: bool) -> Iterator[None]:
    """Context in which graphs compiled by Inductor run on fake tensors, and only on those.

    Args:
        on_kernel: called with the arguments of each kernel instead of running it.
        for_cuda: whether graphs are fused and scheduled as for an NVIDIA GPU.
    """
    with (
        scheduled_for_triton() if for_cuda else contextlib.nullcontext(),
        mock.patch.object(GraphLowering, "compile_to_module", functools.partialmethod(_load_on_fakes, on_kernel)),
        # The kernels are never built; the query for vector instructions would run the C++ compiler.
        mock.patch.object(cpu_vec_isa, "valid_vec_isa_list", list),
        # A cache hit would return a real kernel, and a fake kernel must not enter the cache.
        inductor_config.patch(fx_graph_cache=False, fx_graph_remote_cache=False),
        functorch_config.patch(
            enable_autograd_cache=False,
            enable_remote_autograd_cache=False,
            force_non_lazy_backward_lowering=True,  # not inside the first backward, whose events are counted
        ),
    ):
        yield


def _load_on_fakes(graph: GraphLowering, on_kernel: Callable[[Sequence[Any]], None]) -> types.ModuleType:
    """Replaces ``compile_to_module``: loads the generated wrapper with fake allocations and without kernels."""
    code, _ = graph.codegen()
    source = code.value.replace("from torch._inductor.async_compile import AsyncCompile", "")
    module = types.ModuleType("galore_fx_wrapper_on_fakes")
    module.__file__ = "<wrapper>"
    scope, kernels = vars(module), _NoKernels(on_kernel)
    scope.update(graph.constants, AsyncCompile=lambda: kernels, **{KERNEL: kernels.run}, **graph.torchbind_constants)
    exec(compile(source, module.__file__, "exec"), scope)
    scope.update(
        empty_strided_cpu=_empty_on("cpu"),
        empty_strided_cuda=_empty_on("cuda"),
        reinterpret_tensor=_reinterpret,
        assert_size_stride=_nothing,
        assert_alignment=_nothing,
    )
    return module


class _NoKernels:
    """Replaces Inductor's ``AsyncCompile``: every kernel becomes a call of ``on_kernel`` that computes nothing."""

    def __init__(self, on_kernel: Callable[[Sequence[Any]], None]) -> None:
        self._on_kernel = on_kernel

    def wait(self, _scope: dict[str, Any]) -> None:
        return None

    def __getattr__(self, _language: str) -> Callable[..., Any]:
        return lambda *_source, **_settings: self.run

    def run(self, *arguments: Any, **_settings: Any) -> None:
        """Reports one call of a kernel."""
        self._on_kernel(arguments)


def _nothing(*_arguments: Any, **_settings: Any) -> None:
    return None


def _empty_on(device: str) -> Callable[..., Tensor]:
    def empty(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device=device)

    return empty


def _reinterpret(tensor: Tensor, size: Any, stride: Any, offset: int = 0) -> Tensor:
    return tensor.as_strided(size, stride, tensor.storage_offset() + offset)
