"""Counts the peak memory of a piece of work, exactly.

On a CPU there is no allocator statistic to read, so the profiler's memory events are added up in the order of time:
exact where all that is freed inside the window was allocated in it, which holds for a warm training step that
updates its state in place. On CUDA the caching allocator's own peak is read.
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
        transient_peak_bytes: highest sum of what was allocated inside it and not yet freed.
        kept_bytes: what it allocated and left behind (negative: it freed more).
    """

    transient_peak_bytes: int
    kept_bytes: int


def count_memory(work: Callable[[], object], device: torch.device) -> MemoryCount:
    """Runs ``work`` once and counts its memory.

    Args:
        work: a warm step: everything it compiles or allocates for good has been compiled and allocated before.
        device: where its tensors live, cpu or cuda.
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
    """Memory allocated by ``work`` on the CPU as it runs.

    Returns:
        (seconds since the first event, bytes live that ``work`` has allocated) at every change, from (0, 0) on.
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
    """Bytes of the storages behind some tensors, each storage once."""
    held = [part for tensor in tensors for part in stored_tensors(tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    return sum(storages.values())
