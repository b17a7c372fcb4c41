"""Simulates training steps on fake tensors and counts their bytes before anything is allocated.

    fake copy of the model  ->  the same decisions, dispatchers, optimizer and hooks as ``compile`` installs
    block graphs            ->  Inductor's own wrappers, run without kernels (fake_inductor.py)
    eager code              ->  runs unchanged (head and loss, hooks, clipping, refreshes)
    StorageCounter          ->  the bytes alive after each event, by category
    BlockCalls              ->  the block that runs at each event
    StepModel               ->  a whole step from three blocks of each row of equal ones

The count is exact in float32 on a CPU (docs/plan_accuracy.md). The internal memory of library kernels (oneDNN's scratch
for bfloat16 products, attention's workspaces) is measured if the training runs on this machine's CPU. On CUDA only the
workspace of attention is known.

Source: the method of torch.distributed._tools.MemTracker (storages followed through a dispatch mode), applied to the
code that Inductor generates.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import fx, nn

from galore_fx.assembly.decisions import Decisions
from galore_fx.errors import ModelError
from galore_fx.passes.memory_plan.cuda_attention import attention_of_cuda, cuda_kernel_scratch_bytes
from galore_fx.passes.memory_plan.fake_inductor import lowering_only
from galore_fx.passes.memory_plan.kernel_scratch import kernel_scratch_bytes
from galore_fx.passes.memory_plan.repeated_blocks import deepcopy_short, short_lists, stand_ins
from galore_fx.passes.memory_plan.roofline import RTX_4090, this_cpu
from galore_fx.passes.memory_plan.step_model import StepModel
from galore_fx.passes.memory_plan.storage_counter import StorageCounter
from galore_fx.passes.model_graph.find_regions import find_regions
from galore_fx.passes.model_graph.order_consumers import compile_region
from galore_fx.passes.model_graph.region_compiler import RegionCompiler, Regions
from galore_fx.passes.optimizer_graph.round_weights import CompiledRounding
from galore_fx.passes.optimizer_graph.update_compiler import Variants
from galore_fx.plan_record import Prediction
from galore_fx.runtime.uniform_loop import playing_some
from galore_fx.simulation.fake_model import fake_batch, fake_copy, fake_mode
from galore_fx.simulation.fake_run import as_if_real
from galore_fx.simulation.sample import describe_sample
from galore_fx.simulation.simulated_training import FakeTraining, NotAdditive, PlayedBlocks, SimulatedStep

# The caching allocator rounds allocations up to multiples of this (c10/cuda/CUDACachingAllocator, kMinBlockSize).
CUDA_GRANULARITY = 512
Decide = Callable[[nn.Module, Variants], Decisions]


class StepSimulator:
    """Simulates trainings of one model on one batch; all of them share the lowered graphs.

    Args:
        model: a plain model; it stays unchanged.
        sample: a batch as the model takes it, of the shapes to train with.
        keep_logits: as in ``compile``.
        micro_batches: number of batches that a step accumulates.
        device: "cpu" or "cuda". For "cpu" the internal memory of library kernels and the rates behind the times are
            measured on this machine. For "cuda" graphs are scheduled as by Inductor for Triton, attention in the blocks
            is CUDA's with its workspace, the internal memory of other library kernels is not counted, and the rates
            are an RTX 4090's.
    """

    def __init__(self, model: nn.Module, sample: object, *, keep_logits: bool, micro_batches: int, device: str) -> None:
        self._num_passes = min(micro_batches, 2)  # a third pass equals the second
        self._keep_logits = keep_logits
        self._model, self._sample = model, sample
        self._mode = fake_mode()
        self._regions: Regions = {}
        self._variants = Variants(rounding=CompiledRounding("cpu" if device == "cpu" else "cuda"))
        self._is_cuda = device != "cpu"
        self._scratch = cuda_kernel_scratch_bytes if self._is_cuda else kernel_scratch_bytes
        self._rates = this_cpu() if device == "cpu" else RTX_4090
        self._granularity = 1 if device == "cpu" else CUDA_GRANULARITY
        self._counter: StorageCounter | None = None
        self.is_additive = True  # False once a shortened model has failed to represent the whole

    def train(self, make_decisions: Decide, *, short: bool = True) -> "Training":
        """Returns a training whose steps can be predicted.

        Args:
            make_decisions: returns the decisions of ``compile`` for a copy of the model.
            short: simulate only three blocks of each row of equal ones, if they can represent the rest.

        Raises:
            ModelError: the model does not run on fake tensors.
        """
        return Training(self, make_decisions, short)

    def play(self, make_decisions: Decide, *, short: bool) -> "FakeTraining":
        """Builds the model, or a shortened one, on fake tensors; arguments and errors as in ``train``."""
        regions = find_regions(self._model)
        members = stand_ins(self._model, regions) if short else tuple((i,) for i in range(len(regions)))
        cut = short_lists(self._model, regions, members)
        fake = fake_copy(self._model, self._mode, lambda model: deepcopy_short(model, cut))
        decisions = make_decisions(fake, self._variants)
        for group in decisions.optimizer.param_groups:
            decisions.updates.prepare(group)
        counter = StorageCounter(self._scratch, self._rates.seconds, self._granularity)
        blocks = PlayedBlocks([region.name for region in regions], members)
        num_elements = sum(p.numel() for p in self._model.parameters())
        compiler = RegionCompiler(self._regions, _compile_for_cuda if self._is_cuda else None, all_forms=True)
        with self.simulating(counter):
            args, kwargs = fake_batch(self._sample, self._mode)
            step = SimulatedStep(args, kwargs, self._num_passes, self._keep_logits, self._granularity, self.simulating)
            return FakeTraining(step, fake, decisions, counter, compiler, blocks, num_elements)

    @contextlib.contextmanager
    def simulating(self, counter: StorageCounter) -> Iterator[None]:
        """Context in which steps are simulated and counted.

        Raises:
            NotAdditive: raised inside, and passed on.
            ModelError: any other exception inside.
        """
        before, self._counter = self._counter, counter
        try:
            lowering = lowering_only(self._note_kernel, for_cuda=self._is_cuda)
            with self._mode, lowering, as_if_real(), playing_some(counter.repeat), warnings.catch_warnings():
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

    def _note_kernel(self, arguments: Sequence[Any]) -> None:
        if self._counter is not None:
            self._counter.spend(self._rates.transfer(arguments))


class Training:
    """Predicts the steps of one training, from a shortened model if it represents the whole, else from all blocks."""

    def __init__(self, simulator: StepSimulator, make_decisions: Decide, short: bool) -> None:
        self._simulator, self._make_decisions = simulator, make_decisions
        self._is_short = short and simulator.is_additive
        self._played = simulator.play(make_decisions, short=self._is_short)

    def model(self, shares: Sequence[float], refresh_limit: int | None = None) -> StepModel:
        """Returns the steps of the whole model for any choice of one of these shares per block.

        Args:
            shares: shares of its activations (0 to 1) that a block may keep.
            refresh_limit: most blocks that refresh in one update; None for the recipe's limit.

        Raises:
            ModelError: the model does not run on fake tensors, or does not accept the sample.
        """
        if self._is_short:
            try:
                return self._played.model(shares, refresh_limit)
            except (NotAdditive, ModelError):  # shortened, a model that indexes its layers may not even run
                self._is_short = self._simulator.is_additive = False
                self._played = self._simulator.play(self._make_decisions, short=False)
        return self._played.model(shares, refresh_limit)

    def play_whole(self, policy: Sequence[float]) -> Prediction:
        """Predicts steps in which each simulated block keeps its own share; ``model`` must predict the same.

        All blocks must be simulated (``short=False``), since nothing is extrapolated.
        """
        return self._played.play_whole(policy)

    @property
    def uncaptured(self) -> tuple[str, ...]:
        """Names of the blocks that run uncompiled."""
        return self._played.uncaptured


def _compile_for_cuda(gm: fx.GraphModule, inputs: Sequence[object], activation_budget: float) -> Callable[..., Any]:
    attention_of_cuda(gm)
    return compile_region(gm, inputs, activation_budget)
