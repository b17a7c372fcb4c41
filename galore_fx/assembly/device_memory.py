"""What a device has: for ``budget="auto"``, and to hold a process to its budget."""

import os
import re
from pathlib import Path

import torch
from torch import nn

from galore_fx.errors import SettingError
from galore_fx.runtime.measure.meter import tensor_bytes


def available_bytes(model: nn.Module, device: str | None) -> int:
    """Bytes that training a model may take on its device: what is free now, and what the model itself holds.

    Args:
        model: the model.
        device: where it is to be trained, None for where it is.

    Raises:
        SettingError: it is to be trained elsewhere than it is, or is on the meta device, which has no memory.
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
    """What Linux says could be had without swapping, caches included; elsewhere what is free."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        if found:
            return 1024 * int(found.group(1))
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def enforce_budget(model: nn.Module, budget_bytes: int | None) -> None:
    """Holds this process's CUDA allocator to the budget: what exceeds it is an out-of-memory error at once.

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
