"""What a device has: for ``budget="auto"``, and to hold a process to its budget."""

import os

import torch
from torch import nn

from galore_fx.errors import SettingError
from galore_fx.runtime.meter import tensor_bytes


def available_bytes(model: nn.Module) -> int:
    """Bytes that training a model may take on its device: what is free now, and what the model itself holds.

    Raises:
        SettingError: the model is on the meta device, which has no memory.
    """
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    if device.type != "cpu":
        raise SettingError(
            f"budget 'auto' asks the model's device, and {device} has no memory; give a size such as '16GB'"
        )
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return free + tensor_bytes(tensors)


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
