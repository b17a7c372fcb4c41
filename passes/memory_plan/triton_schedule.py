"""Makes Inductor schedule for an NVIDIA GPU on a machine without one.

Inductor can pass CPU graphs to its Triton backend (``cpu_backend``). Its scheduler then fuses, splits reductions and
places workspaces as for a GPU, on ordinary CPU tensors. Neither Triton nor a CUDA build of torch is needed, because the
source of the kernels is never generated. The scheduler reads the device properties of an RTX 4090.

The patched names are private to Inductor (torch 2.11 to 2.13); they are patched only within the context. Not verified
on a GPU.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from torch._inductor import config as inductor_config
from torch._inductor import ir, scheduler
from torch._inductor.codegen.triton import TritonKernel, TritonScheduling
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V

KERNEL = "galore_fx_kernel"
_RTX_4090 = DeviceProperties(
    type="cuda",
    index=0,
    multi_processor_count=128,
    cc=89,
    major=8,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=1536,
    warp_size=32,
)


@contextlib.contextmanager
def scheduled_for_triton() -> Iterator[None]:
    """Context in which Inductor lowers CPU graphs as for CUDA; their wrappers call ``KERNEL`` for each kernel."""
    with (
        inductor_config.patch(cpu_backend="triton"),
        mock.patch.object(TritonKernel, "codegen_kernel", lambda *_args, **_settings: ""),
        mock.patch.object(TritonKernel, "call_kernel", _call_kernel),
        mock.patch.object(TritonScheduling, "define_kernel", lambda *_args: KERNEL),
        mock.patch.object(DeviceProperties, "create", lambda _device: _RTX_4090),
        mock.patch.object(ir, "is_gpu", lambda _device: True),
        mock.patch.object(scheduler.BaseSchedulerNode, "is_gpu", lambda _node: True),
    ):
        yield


def _call_kernel(kernel: TritonKernel, _name: str, _node: Any = None, deallocate_ws: bool = True) -> None:
    """Replaces ``TritonKernel.call_kernel``: writes the same workspaces around a plain Python call of ``KERNEL``."""
    wrapper: Any = V.graph.wrapper_code
    arguments = kernel.args.python_argdefs()[1]
    for workspace in kernel.args.workspace_args:
        wrapper.generate_workspace_allocation(workspace)
    wrapper.writeline(f"{KERNEL}({', '.join(map(str, arguments))})")
    if deallocate_ws:
        kernel.deallocate_workspaces()
