"""Measures the exact peak memory of a piece of work.

The CPU allocator keeps no statistics, so the profiler's memory events are summed in order of time. The sum is exact if
all memory that the work frees was allocated by it; this holds for a warm training step that updates its state in
place. On CUDA the peak of the caching allocator is read.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from galore_fx.runtime.formats.quantized_tensor import stored_tensors
from galore_fx.runtime.torch_private import memory_events, quiet_profiler


@dataclasses.dataclass(frozen=True)
class MemoryCount:
    """Memory of one piece of work.

    Attributes:
        transient_peak_bytes: highest number of bytes that the work had allocated and not yet freed.
        kept_bytes: bytes allocated minus bytes freed (negative if the work freed more).
    """

    transient_peak_bytes: int
    kept_bytes: int


def count_memory(work: Callable[[], object], device: torch.device) -> MemoryCount:
    """Runs ``work`` once and measures its memory.

    Args:
        work: a warm step, whose compilations and permanent allocations have already happened.
        device: device of its tensors, cpu or cuda.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        return MemoryCount(peak - before, torch.cuda.memory_allocated(device) - before)
    timeline = memory_timeline(work)
    return MemoryCount(max(live for _, live in timeline), timeline[-1][1])


def memory_timeline(work: Callable[[], object]) -> list[tuple[float, int]]:
    """Runs ``work`` once and returns its CPU memory over time.

    Returns:
        (seconds since the first event, live bytes allocated by ``work``) at every change, starting with (0, 0).
    """
    settings = {"activities": [ProfilerActivity.CPU], "profile_memory": True, "acc_events": True}
    with quiet_profiler(), profile(**settings) as profiler:  # type: ignore[arg-type]
        work()
    changes = memory_events(profiler)
    timeline, live = [(0.0, 0)], 0
    for time_ns, num_bytes in changes:
        live += num_bytes
        timeline.append(((time_ns - changes[0][0]) / 1e9, live))
    return timeline


def tensor_bytes(tensors: list[torch.Tensor]) -> int:
    """Returns the bytes of the storages of some tensors, counting each storage once."""
    held = [part for tensor in tensors for part in stored_tensors(tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    return sum(storages.values())
