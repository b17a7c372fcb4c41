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
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from galore_fx.as_if_real import as_if_real
from galore_fx.decisions import Decisions
from galore_fx.errors import ModelError
from galore_fx.fake_model import fake_batch, fake_copy, fake_mode
from galore_fx.installation import InstalledBlocks, install
from galore_fx.optimizer_build import build_optimizer
from galore_fx.passes.memory_plan.block_calls import BlockCalls, Call
from galore_fx.passes.memory_plan.cuda_attention import attention_of_cuda, cuda_kernel_scratch_bytes
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
from galore_fx.runtime.compatibility import compile_graph, num_captured_graphs, tree_leaves
from galore_fx.runtime.dispatch import TrainingForward
from galore_fx.sample import describe_sample

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
            times follow from; "cuda": attention in the blocks is CUDA's, with its workspace; of other kernels none is
            known; the rates are those of an RTX 4090. The graphs are lowered as for the CPU in either case.
    """

    def __init__(self, model: nn.Module, sample: object, *, keep_logits: bool, micro_batches: int, device: str) -> None:
        self.num_passes = min(micro_batches, 2)  # the third is as the second
        self.keep_logits = keep_logits
        self._model, self._sample = model, sample
        self._mode = fake_mode()
        self._regions: Regions = {}
        self._variants: Variants = {}
        self._is_cuda = device != "cpu"
        self._scratch = cuda_kernel_scratch_bytes if self._is_cuda else kernel_scratch_bytes
        self._rates = this_cpu() if device == "cpu" else RTX_4090
        self.granularity = 1 if device == "cpu" else CUDA_GRANULARITY
        self._counter: StorageCounter | None = None
        self.is_additive = True  # until a short model has been seen not to stand for the whole

    def train(self, make_decisions: Decide, *, short: bool = True) -> "Training":
        """A training whose steps are known.

        Args:
            make_decisions: what ``compile`` would decide about a copy of the model.
            short: play three blocks of each row of equal ones, where they can stand for the rest.

        Raises:
            ModelError: the model does not run on fake tensors.
        """
        return Training(self, make_decisions, short)

    def play(self, make_decisions: Decide, *, short: bool) -> "FakeTraining":
        """The model, or a short one for it, on fake tensors. Arguments are those of ``train``."""
        regions = find_regions(self._model)
        members = stand_ins(self._model, regions) if short else tuple((i,) for i in range(len(regions)))
        cut = short_lists(self._model, regions, members)
        fake = fake_copy(self._model, self._mode, lambda model: deepcopy_short(model, cut))
        decisions = make_decisions(fake, self._variants)
        for group in decisions.optimizer.param_groups:
            decisions.updates.prepare(group)
        counter = StorageCounter(self._scratch, self._rates.seconds, self.granularity)
        blocks = PlayedBlocks([region.name for region in regions], members)
        num_elements = sum(p.numel() for p in self._model.parameters())
        compiler = RegionCompiler(self._regions, _compile_for_cuda if self._is_cuda else None, all_forms=True)
        with self.playing(counter):
            return FakeTraining(self, fake, decisions, counter, compiler, blocks, num_elements)

    @contextlib.contextmanager
    def playing(self, counter: StorageCounter) -> Iterator[None]:
        """The surroundings of a simulated step."""
        before, self._counter = self._counter, counter
        try:
            with self._mode, lowering_only(self._note_kernel), as_if_real(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except NotAdditive:
            raise
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


@dataclasses.dataclass(frozen=True)
class PlayedBlocks:
    """Which blocks are played.

    Attributes:
        names: of all blocks.
        members: for each that is played those that it stands for.
    """

    names: list[str]
    members: Sequence[Sequence[int]]


class NotAdditive(Exception):
    """A short model does not stand for the whole one."""


class Training:
    """A training whose steps are known: from a short model where that can stand for the whole, else from all blocks."""

    def __init__(self, simulator: StepSimulator, make_decisions: Decide, short: bool) -> None:
        self._simulator, self._make_decisions = simulator, make_decisions
        self._is_short = short and simulator.is_additive
        self._played = simulator.play(make_decisions, short=self._is_short)

    def model(self, shares: Sequence[float], refresh_limit: int | None = None) -> StepModel:
        """Steps of the whole model, in which each block keeps one of these shares of its activations.

        Args:
            shares: what is open.
            refresh_limit: in place of the recipe's.

        Raises:
            ModelError: the model does not run on fake tensors, or does not accept the sample.
        """
        if self._is_short:
            try:
                return self._played.model(shares, refresh_limit)
            except (NotAdditive, ModelError):  # a model that looks its layers up by place may not even run
                self._is_short = self._simulator.is_additive = False
                self._played = self._simulator.play(self._make_decisions, short=False)
        return self._played.model(shares, refresh_limit)

    def play_whole(self, policy: Sequence[float]) -> Prediction:
        """Steps in which each block that is played keeps its own share, as they are: what ``model`` must equal."""
        return self._played.play_whole(policy)

    @property
    def uncaptured(self) -> tuple[str, ...]:
        """Blocks that run uncompiled."""
        return self._played.uncaptured


class FakeTraining:
    """A model on fake tensors with its optimizer, whose steps are played."""

    def __init__(
        self,
        simulator: StepSimulator,
        fake: nn.Module,
        decisions: Decisions,
        counter: StorageCounter,
        compiler: RegionCompiler,
        played_blocks: PlayedBlocks,
        num_elements: int,
    ) -> None:
        # Refreshes come when they are asked for, and all at once.
        endless = dataclasses.replace(decisions.recipe, refresh_gap=10**9, refresh_limit=None)
        self._refresh_limit = decisions.recipe.refresh_limit
        self._simulator, self._fake, self._counter = simulator, fake, counter
        self._members, self._names = played_blocks.members, played_blocks.names
        self._update_scale = num_elements / sum(p.numel() for p in fake.parameters())
        self._args, self._kwargs = simulator.batch()
        self._optimizer = build_optimizer(
            fake, dataclasses.replace(decisions, recipe=endless), decisions.optimizer
        ).optimizer
        self._optimizer.observe = _observer(counter)
        self._calls = BlockCalls(counter, lambda: compiler.last_run)
        head = None if simulator.keep_logits else _CountedHead(counter)
        self._modules = [region.module for region in decisions.regions]
        policy = decisions.plan.activation_policy
        self._blocks = install(fake, decisions.regions, compiler, head, policy=policy, strict=False)
        _watch(fake, self._blocks, self._calls)
        self._played: dict[float, list[PlayedStep]] = {}
        self._evaluation: PlayedStep | None = None
        with counter:
            counter.learn_sums()

    def model(self, shares: Sequence[float], refresh_limit: int | None) -> StepModel:
        """As ``Training.model``.

        Raises:
            NotAdditive: what is played does not stand for all.
        """
        for share in shares:
            if share not in self._played:
                self._played[share] = self._play([share] * len(self._members))
        played = {share: self._played[share] for share in shares}
        limit = self._refresh_limit if refresh_limit is None else refresh_limit
        return StepModel(played, self._members, self._persistent(), self._update_scale, limit)

    def play_whole(self, policy: Sequence[float]) -> Prediction:
        """Steps in which each block that is played keeps its own share, as they are: what ``model`` must equal."""
        model = StepModel({0.0: self._play(policy)}, self._members, self._persistent(), self._update_scale, None)
        return model.prediction((0,) * len(policy), self.uncaptured)

    @property
    def uncaptured(self) -> tuple[str, ...]:
        """Blocks that run uncompiled."""
        failed = {forward.name for forward in self._blocks.forwards if forward.function.failure}
        pairs = zip(self._blocks.forwards, self._members, strict=True)
        return tuple(self._names[block] for forward, members in pairs if forward.name in failed for block in members)

    def _play(self, policy: Sequence[float]) -> list[PlayedStep]:
        """A steady and a refreshing step, all forms of the graphs being known by then, and an evaluation."""
        self._blocks.set_policy(policy)
        with self._simulator.playing(self._counter), self._counter:
            self._optimizer.request_refresh()
            self._step("refreshing ")  # compiles what is new
            refreshing = self._compiled_step("refreshing ")
            steady = self._compiled_step("")
            if self._evaluation is None:
                self._evaluation = self._evaluate()
        return [steady, refreshing, self._evaluation]

    def _compiled_step(self, name: str) -> PlayedStep:
        """A step in which nothing is compiled: what is keeps its example inputs alive longer than a step does.

        The second may compile too: a BERT that classifies settles its kind of problem in the first.
        """
        while True:
            num_graphs = num_captured_graphs()
            if name:
                self._optimizer.request_refresh()
            step = self._step(name)
            if num_captured_graphs() == num_graphs:
                return step

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
        if name != "eval":
            self._check_additive(calls)
        moments = counter.moments(start, counter.now)
        # Saved is what the turn from forward to backward finds: a hidden state that only the next block read is gone.
        turns: dict[int, int] = {}
        for call in calls:
            if call.backward is not None:
                turns[call.settled] = min(call.backward[0], turns.get(call.settled, call.backward[0]))
        saved = [counter.alive_at(turns[c.settled], c.forward) if c.backward else {} for c in calls]
        left = [counter.alive_at(c.settled, c.backward or c.forward) for c in calls]
        return played_step(name, calls, moments, saved, left, counter.costs)

    def _check_additive(self, calls: Sequence[Call]) -> None:
        """Raises where more grows with the number of blocks than what the played ones take, as far as can be seen.

        Of a row that is cut short, every call must have a backward that was noticed, nothing made between two of its
        blocks may wait for the backward, and the block that stands for others and the one behind it are one graph.
        """
        cut = {block for block, members in enumerate(self._members) if len(members) > 1}
        graphs: dict[int, set[object]] = {}
        for call in calls:
            graphs.setdefault(call.block, set()).add(call.graph)
            if call.block in cut and call.backward is None:
                raise NotAdditive(f"no backward of block {call.block} was seen")
        for first, second in itertools.pairwise(calls):
            if {first.block, second.block} & cut and first.number == second.number:
                gap = first.forward[1], second.forward[0]
                between = self._counter.alive_at(second.backward[0], gap) if second.backward else {}
                if sum(between.values()):
                    raise NotAdditive(f"{between} are made between blocks and kept")
        if any(graphs.get(block) != graphs.get(block + 1) for block in cut):
            raise NotAdditive("blocks of a row have different graphs")

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


def _compile_for_cuda(gm: fx.GraphModule, inputs: Sequence[object], activation_budget: float) -> Callable[..., Any]:
    attention_of_cuda(gm)
    return compile_graph(gm, inputs, activation_budget)


def _watch(fake: nn.Module, blocks: InstalledBlocks, calls: BlockCalls) -> None:
    for index, forward in enumerate(blocks.forwards):
        watched = calls.watch(index, forward)
        whole = forward.module.forward
        if isinstance(whole, TrainingForward):  # the model is one block
            whole.original = watched
        else:
            forward.module.forward = watched


def _loss_of(out: Any) -> Tensor:
    """What a training loop would call backward on: the output's ``loss``, else a number, else the first tensor."""
    named = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
    trained = [value for value in tree_leaves(out) if isinstance(value, Tensor) and value.requires_grad]
    found = named if isinstance(named, Tensor) else next((value for value in trained if value.ndim == 0), None)
    if found is None:
        if not trained:
            raise ModelError("its output holds no tensor that a backward could start from")
        found = trained[0]
    return found if found.ndim == 0 else found.float().mean()


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
