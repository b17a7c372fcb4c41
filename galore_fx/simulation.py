"""Plays training steps on fake tensors and counts every byte of them, before any of them is allocated.

    fake copy of the model  ->  the same decisions, dispatchers, optimizer and hooks as ``compile`` installs
    block graphs            ->  Inductor's own wrappers, run without kernels (fake_inductor.py)
    all that is eager       ->  runs as it is (head and loss, hooks, clipping, refreshes)
    StorageCounter          ->  what lives at each moment, and what it is for

Exact in float32 on a CPU (docs/plan_accuracy.md). What library kernels allocate inside themselves (oneDNN's scratch for
bfloat16 products, attention's workspaces) is measured where the training is to run on this machine's CPU, else unknown.

Source: the method of torch.distributed._tools.MemTracker (storages followed through a dispatch mode), applied to the
code that Inductor generates.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from galore_fx.decisions import Decisions
from galore_fx.errors import ModelError
from galore_fx.fake_model import as_if_real, fake_batch, fake_copy, fake_mode
from galore_fx.installation import install
from galore_fx.optimizer_build import build_optimizer
from galore_fx.passes.memory_plan.fake_inductor import lowering_only
from galore_fx.passes.memory_plan.kernel_scratch import kernel_scratch_bytes
from galore_fx.passes.memory_plan.storage_counter import Moment, StorageCounter
from galore_fx.passes.model_graph.head_compiler import HeadCompiler
from galore_fx.passes.model_graph.region_compiler import RegionCompiler, Regions
from galore_fx.passes.optimizer_graph.update_compiler import Variants
from galore_fx.plan_record import Prediction
from galore_fx.runtime.optimizer import SubspaceOptimizer
from galore_fx.sample_check import describe_sample

Decide = Callable[[nn.Module, Variants], Decisions]


class StepSimulator:
    """Predicts steps of one model on one batch; what has been lowered for one prediction serves the next.

    Args:
        model: a plain model; it is not touched.
        sample: a batch as the model takes it, of the shapes it will be trained with.
        keep_logits: as of ``compile``.
        micro_batches: how many of these batches a step accumulates.
        measure_kernels: count what library kernels of this machine's CPU allocate inside themselves, by running them.
    """

    def __init__(
        self, model: nn.Module, sample: object, *, keep_logits: bool, micro_batches: int, measure_kernels: bool
    ) -> None:
        self.scratch = kernel_scratch_bytes if measure_kernels else None
        self.num_passes = min(micro_batches, 2)  # the third is as the second
        self._model, self._sample, self.keep_logits = model, sample, keep_logits
        self._mode = fake_mode()
        self._regions: Regions = {}
        self._variants: Variants = {}

    def predict(self, make_decisions: Decide) -> Prediction:
        """The peak of a whole training step, by phase and category: steady, refreshing, and an evaluation.

        Args:
            make_decisions: what ``compile`` would decide about a copy of the model.

        Raises:
            ModelError: the model does not run on fake tensors, or does not accept the sample.
        """
        fake = fake_copy(self._model, self._mode)
        decisions = make_decisions(fake, self._variants)
        for group in decisions.optimizer.param_groups:
            decisions.updates.prepare(group)
        args, kwargs = fake_batch(self._sample, self._mode)
        compiler = RegionCompiler(self._regions, activation_budget=decisions.recipe.activation_budget)
        try:
            with self._mode, lowering_only(), as_if_real(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return _play(fake, args, kwargs, decisions, compiler, self)
        except Exception as error:
            raise ModelError(
                f"a training step of {type(self._model).__name__} could not be played on fake tensors with the sample "
                f"{describe_sample(self._sample)}: {type(error).__name__}: {error}"
            ) from error


def _play(
    fake: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    decisions: Decisions,
    compiler: RegionCompiler,
    settings: StepSimulator,
) -> Prediction:
    counter = StorageCounter(settings.scratch)
    endless = dataclasses.replace(decisions.recipe, refresh_gap=10**9)  # refreshes come when they are asked for
    optimizer = build_optimizer(fake, dataclasses.replace(decisions, recipe=endless), decisions.optimizer).optimizer
    optimizer.observe = _observer(counter)
    head = None if settings.keep_logits else _CountedHead(counter)
    forwards = install(fake, decisions.regions, compiler, head, strict=False)

    def step() -> tuple[int, int]:
        return _step(fake, args, kwargs, optimizer, counter, settings.num_passes)

    with counter:
        counter.learn_sums()
        for _ in range(3):  # all forms of the graphs are met: the first two updates refresh, the third does not
            step()
        optimizer.request_refresh()
        refreshing, steady = step(), step()
        evaluation = _evaluate(fake, args, kwargs, counter)
    uncaptured = [forward.name for forward in forwards if forward.function.failure]
    persistent = _persistent_bytes(fake, optimizer, [*args, *kwargs.values()])
    windows = {"": counter.moments(*steady), "refreshing ": counter.moments(*refreshing)}
    return _prediction(persistent, windows, counter.moments(*evaluation), uncaptured)


def _step(
    fake: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    optimizer: SubspaceOptimizer,
    counter: StorageCounter,
    num_passes: int,
) -> tuple[int, int]:
    """One step; the numbers of its first and of its last event."""
    start = counter.now
    for _ in range(num_passes):
        with counter.within("forward", "activations"):
            loss = _loss_of(fake(*args, **kwargs))
        with counter.within("backward", "workspace"):
            loss.backward()
            del loss
        gradients = [record.leaf.grad for record in optimizer.records] + [p.grad for p in fake.parameters()]
        counter.claim([grad for grad in gradients if grad is not None], "gradients")
        del gradients
    with counter.within("update", "workspace"):
        optimizer.step()
    return start, counter.now


def _evaluate(
    fake: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], counter: StorageCounter
) -> tuple[int, int]:
    start = counter.now
    fake.eval()
    with counter.within("eval", "activations"), torch.no_grad():
        fake(*args, **kwargs)
    fake.train()
    return start, counter.now


def _loss_of(out: Any) -> Tensor:
    """What a training loop would call backward on: ``.loss``, or the output itself made a number."""
    loss = getattr(out, "loss", None)
    if loss is None:
        loss = next(value for value in (out if isinstance(out, tuple | list) else [out]) if isinstance(value, Tensor))
    return loss if loss.ndim == 0 else loss.float().mean()


def _observer(counter: StorageCounter) -> Callable[[str, Tensor | None], Any]:
    @contextmanager
    def observe(what: str, grad: Tensor | None) -> Iterator[None]:
        if grad is not None:
            counter.claim([grad], "gradients")
        with counter.within(what, "workspace"):
            yield

    return observe


class _CountedHead(HeadCompiler):
    """Head and loss, whose allocations count as the loss's."""

    def __init__(self, counter: StorageCounter) -> None:
        super().__init__()
        self._counter = counter

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[object]) -> Callable[..., Any]:
        """As ``HeadCompiler``."""
        forward = super().__call__(gm, example_inputs)

        def counted(*inputs: object) -> Any:
            with self._counter.category("loss"):
                return forward(*inputs)

        return counted


def _persistent_bytes(fake: nn.Module, optimizer: SubspaceOptimizer, batch: list[Any]) -> dict[str, int]:
    """What lives through the whole step, each storage once."""
    seen: set[int] = set()

    def count(tensors: Any) -> int:
        storages = {id(t.untyped_storage()): t.untyped_storage() for t in tensors if isinstance(t, Tensor)}
        new = {key: storage for key, storage in storages.items() if key not in seen}
        seen.update(new)
        return sum(storage.nbytes() for storage in new.values())

    return {
        "weights": count([*fake.parameters(), *fake.buffers()]),
        "bases": count([t for r in optimizer.records for t in (r.basis, r.leaf, r.sketch_leaf)]),
        "optimizer_state": count([t for state in optimizer.state.values() for t in state.values()]),
        "activations": count(batch),
    }


def _prediction(
    persistent: dict[str, int], windows: dict[str, list[Moment]], evaluation: list[Moment], uncaptured: list[str]
) -> Prediction:
    kept = sum(persistent.values())
    phases = {"load": kept}
    peak, categories = kept, dict(persistent)
    for prefix, moments in [*windows.items(), ("", evaluation)]:
        for moment in moments:
            name = moment.phase if moment.phase in ("refresh", "eval") else prefix + moment.phase
            phases[name] = max(phases.get(name, 0), kept + moment.total)
            if kept + moment.total > peak:
                peak = kept + moment.total
                categories = {
                    key: persistent.get(key, 0) + moment.categories.get(key, 0)
                    for key in {**persistent, **moment.categories}
                }
    timeline = [(m.phase, {**persistent, **_added(persistent, m.categories)}) for m in windows[""]]
    phases["save"] = kept
    return Prediction(peak, phases, categories, tuple(timeline), tuple(uncaptured))


def _added(persistent: dict[str, int], categories: dict[str, int]) -> dict[str, int]:
    return {key: persistent.get(key, 0) + value for key, value in categories.items()}
