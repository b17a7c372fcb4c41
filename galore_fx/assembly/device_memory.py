"""Reads the free memory of a device for ``budget="auto"`` and limits a process to its budget."""

import os
import re
from pathlib import Path

import torch
from torch import nn

from galore_fx.errors import SettingError
from galore_fx.runtime.measure.meter import tensor_bytes


def available_bytes(model: nn.Module, device: str | None) -> int:
    """Returns the bytes that training may use on the model's device: free memory plus the model's own.

    Args:
        model: the model.
        device: type of the device to train on, "cpu" or "cuda"; None for the model's.

    Raises:
        SettingError: the model is on another device than it trains on, or neither on a CPU nor on CUDA (a meta model).
    """
    tensors = [*model.parameters(), *model.buffers()]
    here = tensors[0].device
    if here.type not in ("cpu", "cuda") or device not in (None, here.type):
        raise SettingError(
            f"budget 'auto' asks the model's device, which is {here}"
            f"{'' if device is None else f' and not {device}'}; give a size like '16GB'"
        )
    own = tensor_bytes(tensors)
    if here.type == "cuda":
        free, _ = torch.cuda.mem_get_info(here)
        return free + torch.cuda.memory_reserved(here) - torch.cuda.memory_allocated(here) + own
    return _available_on_cpu() + own


def _available_on_cpu() -> int:
    """Returns Linux's MemAvailable in bytes (obtainable without swapping, caches included); elsewhere free memory."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        if found:
            return 1024 * int(found.group(1))
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def enforce_budget(model: nn.Module, budget_bytes: int | None) -> None:
    """Limits this process's CUDA allocator to the budget; an allocation beyond it is an out-of-memory error.

    Raises:
        SettingError: there is no budget, the model is not on a CUDA device, or the device has less than the budget.
    """
    device = next(model.parameters()).device
    if budget_bytes is None:
        raise SettingError("enforce=True needs a budget to enforce")
    if device.type != "cuda":
        raise SettingError(f"enforce=True needs a model on a CUDA device; this one is on {device}")
    total = torch.cuda.get_device_properties(device).total_memory
    if budget_bytes > total:
        raise SettingError(f"enforce=True: the budget of {budget_bytes} bytes exceeds the device's {total}")
    torch.cuda.set_per_process_memory_fraction(budget_bytes / total, device)
