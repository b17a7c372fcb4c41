"""Simulates training steps of one model on fake tensors and attributes their events to the blocks."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, fx, nn

from galore_fx.assembly.assemble import Forwards, assemble
from galore_fx.assembly.decisions import Decisions, refresh_limits
from galore_fx.assembly.install_forwards import InstalledBlocks
from galore_fx.assembly.refresh_cost import refresh_costs
from galore_fx.errors import ModelError
from galore_fx.passes.memory_plan.block_calls import BlockCalls, Call
from galore_fx.passes.memory_plan.step_model import PlayedStep, StepModel, played_step
from galore_fx.passes.memory_plan.storage_counter import StorageCounter
from galore_fx.passes.model_graph.head_compiler import HeadCompiler
from galore_fx.passes.model_graph.region_compiler import RegionCompiler
from galore_fx.plan_record import Prediction
from galore_fx.recipes.parts import UNSET, parts_of
from galore_fx.recipes.recipe import Recipe
from galore_fx.runtime.dispatch.forwards import TrainingForward
from galore_fx.runtime.formats.quantized_tensor import stored_tensors
from galore_fx.runtime.formats.state_format import is_of_residual
from galore_fx.runtime.layers.normalized_linear import trained_parts
from galore_fx.runtime.torch_private import num_captured_graphs, tree_leaves


@dataclasses.dataclass(frozen=True)
class PlayedBlocks:
    """The simulated blocks, each the representative of one or more blocks.

    Attributes:
        names: names of all blocks of the model.
        members: for each simulated block the indices of the blocks that it represents, itself included.
    """

    names: list[str]
    members: Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class SimulatedStep:
    """Settings of a simulated step, and the context that it runs in.

    Attributes:
        args, kwargs: the batch, on fake tensors.
        num_passes: forwards and backwards before each update.
        keep_logits: as in ``galore_fx.compile``.
        granularity: bytes to a multiple of which each allocation is rounded up.
        simulating: returns the context in which graphs are lowered and run on fake tensors; takes the counter.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    num_passes: int
    keep_logits: bool
    granularity: int
    simulating: Callable[[StorageCounter], AbstractContextManager[None]]


class NotAdditive(Exception):
    """A shortened model does not represent the whole one."""


class FakeTraining:
    """A model on fake tensors with its optimizer, whose steps are simulated."""

    def __init__(
        self,
        step: SimulatedStep,
        fake: nn.Module,
        decisions: Decisions,
        counter: StorageCounter,
        compiler: RegionCompiler,
        played_blocks: PlayedBlocks,
        num_elements: int,
    ) -> None:
        # Refreshes happen on request only, all in one update. The refresh criterion runs in every step, but never
        # triggers one.
        neutral = {name: part.simulated for name, part in parts_of(Recipe).items() if part.simulated is not UNSET}
        endless = dataclasses.replace(decisions.recipe, **neutral)
        self._refresh_limit = _most_refreshes(decisions, played_blocks)
        self._settings, self._fake, self._counter = step, fake, counter
        self._members, self._names = played_blocks.members, played_blocks.names
        self._update_scale = num_elements / sum(p.numel() for p in fake.parameters())
        self._calls = BlockCalls(counter, lambda: compiler.last_run)
        forwards = Forwards(None if step.keep_logits else _CountedHead(counter))
        assembled = assemble(fake, decisions, decisions.optimizer, compiler, forwards, trained_with=endless)
        self._optimizer, self._blocks = assembled.optimizer, assembled.installed
        self._optimizer.observe = _observer(counter)
        self._modules = [region.module for region in decisions.regions]
        _watch(fake, self._blocks, self._calls)
        self._played: dict[float, list[PlayedStep]] = {}
        self._evaluation: PlayedStep | None = None
        with counter:
            counter.learn_sums()

    def model(self, shares: Sequence[float], refresh_limit: int | None) -> StepModel:
        """Returns the step model, as ``Training.model``.

        Raises:
            NotAdditive: the simulated blocks do not represent all blocks.
            ModelError: a step cannot be simulated.
        """
        for share in shares:
            if share not in self._played:
                self._played[share] = self._play([share] * len(self._members))
        played = {share: self._played[share] for share in shares}
        limit = self._refresh_limit if refresh_limit is None else refresh_limit
        return StepModel(played, self._members, self._persistent(), self._update_scale, limit)

    def play_whole(self, policy: Sequence[float]) -> Prediction:
        """Predicts steps in which each simulated block keeps its own share; ``model`` must predict the same.

        All blocks must be simulated, since nothing is extrapolated.
        """
        model = StepModel({0.0: self._play(policy)}, self._members, self._persistent(), self._update_scale, None)
        return model.prediction((0,) * len(policy), self.uncaptured)

    @property
    def uncaptured(self) -> tuple[str, ...]:
        """Names of the blocks that run uncompiled."""
        failed = {forward.name for forward in self._blocks.forwards if forward.function.failure}
        pairs = zip(self._blocks.forwards, self._members, strict=True)
        return tuple(self._names[block] for forward, members in pairs if forward.name in failed for block in members)

    def _play(self, policy: Sequence[float]) -> list[PlayedStep]:
        """Simulates a steady step, a refreshing one and an evaluation, in which nothing is compiled any more."""
        self._blocks.set_policy(policy)
        with self._settings.simulating(self._counter), self._counter:
            self._optimizer.request_refresh()
            self._step("refreshing ")  # compiles what is new
            refreshing = self._compiled_step("refreshing ")
            steady = self._compiled_step("")
            if self._evaluation is None:
                self._evaluation = self._evaluate()
        return [steady, refreshing, self._evaluation]

    def _compiled_step(self, name: str) -> PlayedStep:
        """Simulates a step without compilation, which would keep its example inputs alive longer than a step does.

        The first attempt may compile: a BERT for classification settles its problem type in the step before.
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
        for _ in range(self._settings.num_passes):
            with counter.within("forward", "activations"):
                loss = _loss_of(fake(*self._settings.args, **self._settings.kwargs))
            with counter.within("backward", "workspace"):
                loss.backward()
                del loss
            self._calls.settle()
            leaves = (leaf for record in self._optimizer.records for leaf in record.gradient_leaves())
            gradients = [leaf.grad for leaf in (*leaves, *fake.parameters())]
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
            out = fake(*self._settings.args, **self._settings.kwargs)
            self._calls.settle()
            del out
        fake.train()
        return self._sorted("eval", start)

    def _sorted(self, name: str, start: int) -> PlayedStep:
        counter, calls = self._counter, self._calls.take()
        if name != "eval":
            self._check_additive(calls)
        moments = counter.moments(start, counter.now)
        # Bytes alive when the backward begins are saved; a hidden state that only the next block read is freed by then.
        turns: dict[int, int] = {}
        for call in calls:
            if call.backward is not None:
                turns[call.settled] = min(call.backward[0], turns.get(call.settled, call.backward[0]))
        saved = [counter.alive_at(turns[c.settled], c.forward) if c.backward else {} for c in calls]
        left = [counter.alive_at(c.settled, c.backward or c.forward) for c in calls]
        return played_step(name, calls, moments, saved, left, counter.costs)

    def _check_additive(self, calls: Sequence[Call]) -> None:
        """Checks, as far as possible, that nothing grows with the number of blocks beyond the blocks' own bytes.

        Every call of a block that represents others must have an observed backward, no tensor made between it and its
        neighbours may be kept for the backward, and the block after it must have the same graph.

        Raises:
            NotAdditive: one of these does not hold.
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
        """Returns the bytes by category that live through the step: each storage once, times the blocks represented."""
        seen: set[int] = set()
        optimizer = self._optimizer
        records = {id(record.weight): record for record in optimizer.records}

        found: dict[str, int] = {}

        def count(category: str, times: int, tensors: Iterable[Any]) -> None:
            held = [part for t in tensors if isinstance(t, Tensor) for part in stored_tensors(t)]
            storages = {id(t.untyped_storage()): t.untyped_storage() for t in held}
            sizes = [storage.nbytes() for key, storage in storages.items() if key not in seen]
            seen.update(storages)
            padding = sum(-size % self._settings.granularity for size in sizes)
            found[category] = found.get(category, 0) + times * sum(sizes)
            if padding:
                found["rounding"] = found.get("rounding", 0) + times * padding

        for module, members in [*zip(self._modules, self._members, strict=True), (self._fake, (0,))]:
            parameters, times = list(module.parameters()), len(members)
            own = [records[id(p)] for p in parameters if id(p) in records]
            states = [optimizer.state[p] for p in parameters if p in optimizer.state]
            count("factors", times, trained_parts(module))
            count("weights", times, [*parameters, *module.buffers()])
            count("bases", times, [t for r in own for t in r.kept_tensors()])
            count("optimizer_state", times, [t for state in states for k, t in state.items() if not is_of_residual(k)])
            count("residuals", times, [t for state in states for k, t in state.items() if is_of_residual(k)])
        count("activations", 1, [*self._settings.args, *self._settings.kwargs.values()])
        return found


def _most_refreshes(decisions: Decisions, played: PlayedBlocks) -> int | None:
    """Returns how many blocks of the whole model may refresh together at most; None for all."""
    costs = refresh_costs(decisions.regions, decisions.plan.parameters, decisions.recipe)
    of_all = [costs[block] for block, members in enumerate(played.members) if block in costs for _ in members]
    return refresh_limits(decisions.recipe).most_layers(of_all)


def _watch(fake: nn.Module, blocks: InstalledBlocks, calls: BlockCalls) -> None:
    for index, forward in enumerate(blocks.forwards):
        watched = calls.watch(index, forward)
        whole = forward.module.forward
        if isinstance(whole, TrainingForward):  # the model is one block
            whole.original = watched
        else:
            forward.module.forward = watched


def _loss_of(out: Any) -> Tensor:
    """Returns the scalar that a training loop would call backward on.

    It is the output's ``loss``; else the first scalar, or else the first tensor, that requires a gradient. Tensors
    that are no scalars are averaged in float32.

    Raises:
        ModelError: the output has no such tensor.
    """
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
    """Compiles head and loss so that their allocations count under the category "loss"."""

    def __init__(self, counter: StorageCounter) -> None:
        super().__init__()
        self._counter = counter

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[object]) -> Callable[..., Any]:
        """Returns the callable of ``HeadCompiler``, within the category "loss"."""
        forward = super().__call__(gm, example_inputs)

        def counted(*inputs: object) -> Any:
            with self._counter.category("loss"):
                return forward(*inputs)

        return counted
