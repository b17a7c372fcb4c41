"""Plays training steps on fake tensors and counts every byte of them, before any of them is allocated.

    fake copy of the model  ->  the same decisions, dispatchers, optimizer and hooks as ``compile`` installs
    block graphs            ->  Inductor's own wrappers, run without kernels (fake_inductor.py)
    all that is eager       ->  runs as it is (head and loss, hooks, clipping, refreshes)
    StorageCounter          ->  what lives at each moment, and what it is for
    BlockCalls              ->  which block runs then
    StepModel               ->  of a row of equal blocks three are played, and stand for all

Exact in float32 on a CPU (docs/plan_accuracy.md). What library kernels allocate inside themselves (oneDNN's scratch for
bfloat16 products, attention's workspaces) is measured where the training is to run on this machine's CPU, else unknown.

Source: the method of torch.distributed._tools.MemTracker (storages followed through a dispatch mode), applied to the
code that Inductor generates.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from galore_fx.as_if_real import as_if_real
from galore_fx.decisions import Decisions
from galore_fx.errors import ModelError
from galore_fx.fake_model import fake_batch, fake_copy, fake_mode
from galore_fx.installation import InstalledBlocks, install
from galore_fx.optimizer_build import build_optimizer
from galore_fx.passes.memory_plan.block_calls import BlockCalls
from galore_fx.passes.memory_plan.fake_inductor import lowering_only
from galore_fx.passes.memory_plan.kernel_scratch import kernel_scratch_bytes
from galore_fx.passes.memory_plan.repeated_blocks import deepcopy_short, short_lists, stand_ins
from galore_fx.passes.memory_plan.roofline import RTX_4090, this_cpu
from galore_fx.passes.memory_plan.step_model import PlayedStep, StepModel, played_step
from galore_fx.passes.memory_plan.storage_counter import StorageCounter
from galore_fx.passes.model_graph.find_regions import find_regions
from galore_fx.passes.model_graph.head_compiler import HeadCompiler
from galore_fx.passes.model_graph.region_compiler import RegionCompiler, Regions
from galore_fx.passes.optimizer_graph.update_compiler import Variants
from galore_fx.plan_record import Prediction
from galore_fx.runtime.dispatch import TrainingForward
from galore_fx.sample_check import describe_sample

# The caching allocator rounds every block up to this (c10/cuda/CUDACachingAllocator, kMinBlockSize).
CUDA_GRANULARITY = 512
Decide = Callable[[nn.Module, Variants], Decisions]


class StepSimulator:
    """Simulates the training of one model on one batch; what has been lowered for one serves the next.

    Args:
        model: a plain model; it is not touched.
        sample: a batch as the model takes it, of the shapes it will be trained with.
        keep_logits: as of ``compile``.
        micro_batches: how many of these batches a step accumulates.
        device: "cpu": what library kernels allocate inside themselves is measured here, as are the rates that the
            times follow from; "cuda": no such allocation, and the rates of an RTX 4090.
    """

    def __init__(self, model: nn.Module, sample: object, *, keep_logits: bool, micro_batches: int, device: str) -> None:
        self.num_passes = min(micro_batches, 2)  # the third is as the second
        self.keep_logits = keep_logits
        self._model, self._sample = model, sample
        self._mode = fake_mode()
        self._regions: Regions = {}
        self._variants: Variants = {}
        self._scratch = kernel_scratch_bytes if device == "cpu" else None
        self._rates = this_cpu() if device == "cpu" else RTX_4090
        self.granularity = 1 if device == "cpu" else CUDA_GRANULARITY
        self._counter: StorageCounter | None = None

    def train(self, make_decisions: Decide, *, short: bool = True) -> "FakeTraining":
        """A training whose steps can be played.

        Args:
            make_decisions: what ``compile`` would decide about a copy of the model.
            short: play three blocks of each row of equal ones, and let the second stand for the rest.

        Raises:
            ModelError: the model does not run on fake tensors.
        """
        regions = find_regions(self._model)
        members = stand_ins(self._model, regions) if short else tuple((i,) for i in range(len(regions)))
        cut = short_lists(self._model, regions, members)
        fake = fake_copy(self._model, self._mode, lambda model: deepcopy_short(model, cut))
        decisions = make_decisions(fake, self._variants)
        for group in decisions.optimizer.param_groups:
            decisions.updates.prepare(group)
        counter = StorageCounter(self._scratch, self._rates.seconds, self.granularity)
        num_elements = sum(p.numel() for p in self._model.parameters())
        compiler = RegionCompiler(self._regions, all_forms=True)
        with self.playing(counter):
            return FakeTraining(self, fake, decisions, counter, compiler, members, num_elements)

    @contextlib.contextmanager
    def playing(self, counter: StorageCounter) -> Iterator[None]:
        """The surroundings of a simulated step."""
        before, self._counter = self._counter, counter
        try:
            with self._mode, lowering_only(self._note_kernel), as_if_real(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except Exception as error:
            raise ModelError(
                f"a training step of {type(self._model).__name__} could not be played on fake tensors with the sample "
                f"{describe_sample(self._sample)}: {type(error).__name__}: {error}"
            ) from error
        finally:
            self._counter = before

    def batch(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The sample on fake tensors."""
        return fake_batch(self._sample, self._mode)

    def _note_kernel(self, arguments: Sequence[Any]) -> None:
        if self._counter is not None:
            self._counter.spend(self._rates.transfer(arguments))


class FakeTraining:
    """A model on fake tensors with its optimizer, whose steps are played. Made by ``StepSimulator.train``."""

    def __init__(
        self,
        simulator: StepSimulator,
        fake: nn.Module,
        decisions: Decisions,
        counter: StorageCounter,
        compiler: RegionCompiler,
        members: Sequence[Sequence[int]],
        num_elements: int,
    ) -> None:
        endless = dataclasses.replace(decisions.recipe, refresh_gap=10**9)  # refreshes come when they are asked for
        self._simulator, self._fake, self._counter = simulator, fake, counter
        self._members = members
        self._update_scale = num_elements / sum(p.numel() for p in fake.parameters())
        self._args, self._kwargs = simulator.batch()
        self._optimizer = build_optimizer(
            fake, dataclasses.replace(decisions, recipe=endless), decisions.optimizer
        ).optimizer
        self._optimizer.observe = _observer(counter)
        self._calls = BlockCalls(counter)
        head = None if simulator.keep_logits else _CountedHead(counter)
        self._modules = [region.module for region in decisions.regions]
        policy = decisions.plan.activation_policy
        self._blocks = install(fake, decisions.regions, compiler, head, policy=policy, strict=False)
        _watch(fake, self._blocks, self._calls)
        self._played: dict[float, list[PlayedStep]] = {}
        self._evaluation: PlayedStep | None = None
        with counter:
            counter.learn_sums()

    def model(self, shares: Sequence[float]) -> StepModel:
        """Steps of the whole model, in which each block keeps one of these shares of its activations.

        Raises:
            ModelError: the model does not run on fake tensors, or does not accept the sample.
        """
        for share in shares:
            if share not in self._played:
                self._played[share] = self._play([share] * len(self._members))
        played = {share: self._played[share] for share in shares}
        return StepModel(played, self._members, self._persistent(), self._update_scale)

    def play_whole(self, policy: Sequence[float]) -> Prediction:
        """Steps in which each block that is played keeps its own share, as they are: what ``model`` must equal."""
        model = StepModel({0.0: self._play(policy)}, self._members, self._persistent(), self._update_scale)
        return model.prediction((0,) * len(policy), self.uncaptured)

    @property
    def uncaptured(self) -> tuple[str, ...]:
        """Blocks that run uncompiled."""
        return tuple(self._blocks.failures)

    def _play(self, policy: Sequence[float]) -> list[PlayedStep]:
        """A steady and a refreshing step, all forms of the graphs being known by then, and an evaluation."""
        self._blocks.set_policy(policy)
        with self._simulator.playing(self._counter), self._counter:
            for _ in range(2):  # the first compiles what is new
                self._optimizer.request_refresh()
                refreshing = self._step("refreshing ")
            steady = self._step("")
            if self._evaluation is None:
                self._evaluation = self._evaluate()
        return [steady, refreshing, self._evaluation]

    def _step(self, name: str) -> PlayedStep:
        counter, fake = self._counter, self._fake
        counter.forget()
        start = counter.now
        for _ in range(self._simulator.num_passes):
            with counter.within("forward", "activations"):
                loss = _loss_of(fake(*self._args, **self._kwargs))
            with counter.within("backward", "workspace"):
                loss.backward()
                del loss
            self._calls.settle()
            gradients = [record.leaf.grad for record in self._optimizer.records] + [p.grad for p in fake.parameters()]
            counter.claim([grad for grad in gradients if grad is not None], "gradients")
            del gradients
        with counter.within("update", "workspace"):
            self._optimizer.step()
        return self._sorted(name, start)

    def _evaluate(self) -> PlayedStep:
        counter, fake = self._counter, self._fake
        counter.forget()
        start = counter.now
        fake.eval()
        with counter.within("eval", "activations"), torch.no_grad():
            out = fake(*self._args, **self._kwargs)
            self._calls.settle()
            del out
        fake.train()
        return self._sorted("eval", start)

    def _sorted(self, name: str, start: int) -> PlayedStep:
        counter, calls = self._counter, self._calls.take()
        moments = counter.moments(start, counter.now)
        saved = [counter.alive_at(c.forward[1], c.forward) if c.backward else {} for c in calls]
        left = [counter.alive_at(c.settled, c.backward or c.forward) for c in calls]
        return played_step(name, calls, moments, saved, left, counter.costs)

    def _persistent(self) -> dict[str, int]:
        """What lives through the whole step, each storage once; of a block as often as it stands for others."""
        seen: set[int] = set()
        optimizer = self._optimizer
        records = {id(record.weight): record for record in optimizer.records}

        found: dict[str, int] = {}

        def count(category: str, times: int, tensors: Iterable[Any]) -> None:
            storages = {id(t.untyped_storage()): t.untyped_storage() for t in tensors if isinstance(t, Tensor)}
            sizes = [storage.nbytes() for key, storage in storages.items() if key not in seen]
            seen.update(storages)
            padding = sum(-size % self._simulator.granularity for size in sizes)
            found[category] = found.get(category, 0) + times * sum(sizes)
            if padding:
                found["rounding"] = found.get("rounding", 0) + times * padding

        for module, members in [*zip(self._modules, self._members, strict=True), (self._fake, (0,))]:
            parameters, times = list(module.parameters()), len(members)
            own = [records[id(p)] for p in parameters if id(p) in records]
            states = [optimizer.state[p] for p in parameters if p in optimizer.state]
            count("weights", times, [*parameters, *module.buffers()])
            count("bases", times, [t for r in own for t in (r.basis, r.leaf, r.sketch_leaf)])
            count("optimizer_state", times, [t for state in states for t in state.values()])
        count("activations", 1, [*self._args, *self._kwargs.values()])
        return found


def _watch(fake: nn.Module, blocks: InstalledBlocks, calls: BlockCalls) -> None:
    for index, forward in enumerate(blocks.forwards):
        watched = calls.watch(index, forward)
        whole = forward.module.forward
        if isinstance(whole, TrainingForward):  # the model is one block
            whole.original = watched
        else:
            forward.module.forward = watched


def _loss_of(out: Any) -> Tensor:
    """What a training loop would call backward on: ``.loss``, or the output itself made a number."""
    loss = getattr(out, "loss", None)
    if loss is None:
        loss = next(value for value in (out if isinstance(out, tuple | list) else [out]) if isinstance(value, Tensor))
    return loss if loss.ndim == 0 else loss.float().mean()


def _observer(counter: StorageCounter) -> Callable[[str, Tensor | None], Any]:
    @contextlib.contextmanager
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
