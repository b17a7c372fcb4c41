"""Compares the memory peak of an early training step with the plan and reports the excess by category."""

import warnings
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

# Index of the measured step. The steps before it compile, and refresh in a row.
_WATCHED_STEP = 3


class StepMeter(Protocol):
    """Measures the peak memory between two calls."""

    def start(self) -> None:
        """Starts the measurement."""

    def stop(self) -> int:
        """Ends the measurement and returns the peak of live bytes, including those allocated before the start."""


class CudaMeter:
    """Reads the peak of CUDA's caching allocator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def start(self) -> None:
        """Starts the measurement."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def stop(self) -> int:
        """Ends the measurement and returns the peak of allocated bytes."""
        return torch.cuda.max_memory_allocated(self._device)


class PeakWatch:
    """Measures one step, from its first training forward to the end of ``optimizer.step()``, and warns of an excess.

    Args:
        meter: measures the peak.
        predicted_bytes: peak of the plan, without its reserve.
        predicted_kept: planned bytes by category that live through the step.
        count_kept: returns the actual bytes by the same categories.
        tolerance: fraction by which the step may exceed the plan.
    """

    def __init__(
        self,
        meter: StepMeter,
        predicted_bytes: int,
        predicted_kept: Mapping[str, int],
        count_kept: Callable[[], Mapping[str, int]],
        tolerance: float,
    ) -> None:
        self.measured_bytes: int | None = None
        self._meter, self._predicted, self._kept = meter, predicted_bytes, predicted_kept
        self._count_kept, self._tolerance = count_kept, tolerance
        self._num_steps = 0
        self._measures = False

    def forward_begins(self) -> None:
        """Must be called before each training forward."""
        if self._num_steps == _WATCHED_STEP and not self._measures:
            self._measures = True
            self._meter.start()

    def step_ends(self) -> None:
        """Must be called after each ``optimizer.step()``; warns if the measured step exceeds the plan."""
        self._num_steps += 1
        if not self._measures or self.measured_bytes is not None:
            return
        self.measured_bytes = self._meter.stop()
        excess = self.measured_bytes - self._predicted
        if excess <= self._tolerance * self._predicted:
            return
        kept = self._count_kept()
        told = {name: kept.get(name, 0) - size for name, size in self._kept.items()}
        told["activations, loss, workspace or other tensors"] = excess - sum(told.values())
        parts = ", ".join(f"{name} {size:+}" for name, size in told.items() if size)
        warnings.warn(
            f"a training step took {self.measured_bytes} bytes at its peak and was planned for {self._predicted}; "
            f"bytes beyond the plan: {parts}. Free what else is on the device, or give a smaller budget",
            stacklevel=3,
        )
