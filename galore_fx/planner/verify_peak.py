"""Counts the peak of a compiled model's training step by running it, and compares it with the plan."""

from typing import Any

from torch import Tensor, nn

from galore_fx.assembly.compiled_model import Compiled
from galore_fx.plan_record import Plan
from galore_fx.runtime.formats.state_format import is_of_residual
from galore_fx.runtime.layers.normalized_linear import trained_parts
from galore_fx.runtime.measure.meter import count_memory, tensor_bytes
from galore_fx.runtime.measure.peak_watch import CudaMeter, PeakWatch
from galore_fx.runtime.step.subspace_optimizer import SubspaceOptimizer
from galore_fx.simulation.sample import call_arguments

# Fractions by which a step may exceed its plan, exact or estimated, without a warning.
TOLERANCE = 0.01
ESTIMATE_TOLERANCE = 0.1


def counted_peak(model: nn.Module, sample: object) -> int:
    """Runs training steps, which train the model, and returns the highest peak of a steady and the refreshing ones.

    Args:
        model: a model compiled by ``galore_fx.compile``.
        sample: a batch on the model's device, as the model takes it.

    Returns:
        Bytes between steps (weights, bases, states, the batch) plus the most that a step adds; exact on a CPU.
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
    num_turns = _num_turns(optimizer)
    for _ in range(2 * num_turns + 1):  # first refreshes; afterwards everything is compiled
        step()
    steady = count_memory(step, device).transient_peak_bytes
    optimizer.request_refresh()
    for _ in range(num_turns):
        step()  # compiles refreshing forms that have not run yet
    optimizer.request_refresh()
    refreshing = [count_memory(step, device).transient_peak_bytes for _ in range(num_turns)]
    return persistent_bytes(model, [*args, *kwargs.values()]) + max(steady, *refreshing)


def _num_turns(optimizer: SubspaceOptimizer) -> int:
    """Returns the number of updates in which all bases refresh once."""
    queue = optimizer.refreshes.queue
    layers = sorted({queue.layer_of(id(record.weight)) for record in optimizer.records})
    return max(1, queue.limits.num_turns(map(queue.cost_of, layers)))


def persistent_bytes(model: nn.Module, batch: list[Any]) -> int:
    """Returns the bytes that live between the steps of a compiled model, its batch included."""
    compiled = model.galore_fx
    assert isinstance(compiled, Compiled)
    kept = kept_bytes(model, compiled.optimizer)
    return sum(kept.values()) + tensor_bytes([value for value in batch if isinstance(value, Tensor)])


def kept_bytes(model: nn.Module, optimizer: SubspaceOptimizer) -> dict[str, int]:
    """Returns the bytes that live between steps, by category as in ``Prediction.kept``; shared storage counts once."""
    bases = [t for record in optimizer.records for t in record.kept_tensors()]
    states = [(name, tensor) for state in optimizer.state.values() for name, tensor in state.items()]
    categories = {
        "factors": trained_parts(model),
        "weights": [*model.parameters(), *model.buffers()],
        "bases": bases,
        "optimizer_state": [tensor for name, tensor in states if not is_of_residual(name)],
        "residuals": [tensor for name, tensor in states if is_of_residual(name)],
    }
    found, seen = {}, list[Tensor]()
    for category, tensors in categories.items():
        before = tensor_bytes(seen)
        seen += tensors
        found[category] = tensor_bytes(seen) - before
    return found


def watch_peak(model: nn.Module, optimizer: SubspaceOptimizer, plan: Plan) -> PeakWatch | None:
    """Returns a watch that compares an early step with the plan; None without a prediction or off CUDA.

    On CUDA the allocator keeps the peak, so reading it costs nothing.
    """
    device = next(model.parameters()).device
    if plan.prediction is None or device.type != "cuda":
        return None
    kept = {
        name: plan.prediction.kept.get(name, 0)
        for name in ("weights", "factors", "bases", "optimizer_state", "residuals")
    }
    watch = PeakWatch(
        CudaMeter(device),
        plan.prediction.peak_bytes,
        kept,
        lambda: kept_bytes(model, optimizer),
        ESTIMATE_TOLERANCE if plan.estimated else TOLERANCE,
    )
    optimizer.register_step_post_hook(lambda *_: watch.step_ends())
    return watch
