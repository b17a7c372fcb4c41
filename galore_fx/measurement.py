"""The peak of a compiled model's training step, counted by running it."""

from typing import Any

import torch
from torch import Tensor, nn

from galore_fx.handle import Compiled
from galore_fx.runtime.meter import count_memory, tensor_bytes
from galore_fx.sample_check import call_arguments


def counted_peak(model: nn.Module, sample: object) -> int:
    """Bytes of a whole step at its highest, the higher of a steady and a refreshing one; the model trains six steps.

    Args:
        model: compiled by ``galore_fx.compile``.
        sample: a batch on the model's device, as the model takes it.

    Returns:
        What lives between steps (weights, bases, states, the batch) and what a step adds to it at most. Exact on a CPU.
    """
    compiled = model.galore_fx
    assert isinstance(compiled, Compiled)
    optimizer = compiled.optimizer
    args, kwargs = call_arguments(sample, lambda value: value)

    def step() -> None:
        out = model(*args, **kwargs)
        loss = out if isinstance(out, Tensor) else out.loss
        del out
        loss.backward()
        del loss
        optimizer.step()

    device = next(model.parameters()).device
    for _ in range(3):
        step()
    steady = count_memory(step, device).transient_peak_bytes
    optimizer.request_refresh()
    step()  # compiles the refreshing form where it has not been met
    optimizer.request_refresh()
    refreshing = count_memory(step, device).transient_peak_bytes
    return persistent_bytes(model, [*args, *kwargs.values()]) + max(steady, refreshing)


def persistent_bytes(model: nn.Module, batch: list[Any]) -> int:
    """Bytes that live between the steps of a compiled model, and its batch."""
    compiled = model.galore_fx
    assert isinstance(compiled, Compiled)
    optimizer = compiled.optimizer
    tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    tensors += [t for record in optimizer.records for t in (record.basis, record.leaf, record.sketch_leaf)]
    tensors += [t for state in optimizer.state.values() for t in state.values()]
    return tensor_bytes([*tensors, *(value for value in batch if isinstance(value, Tensor))])
