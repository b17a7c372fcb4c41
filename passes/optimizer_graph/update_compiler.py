"""Compiled updates: trace -> lower -> merge -> Inductor, once per optimizer class and setting, for all parameters.

    prologue (host numbers)  ->  body (one fused kernel, any shape)  ->  W <- c W + back_project(L)

The body is elementwise, so parameters of every shape go through it flattened, and one kernel with a dynamic length
serves all of them. Where the step branches on how many steps there were, all branches are in the one body.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from galore_fx.errors import OptimizerError
from galore_fx.passes.optimizer_graph.lower_to_subspace import SCALE, lower_to_subspace
from galore_fx.passes.optimizer_graph.merge_branches import merge_branches, numbers_of
from galore_fx.passes.optimizer_graph.quantize_states import never_negative, quantize_states
from galore_fx.passes.optimizer_graph.round_weights import WeightRounding
from galore_fx.passes.optimizer_graph.trace_step import (
    STATE_PREFIX,
    GroupSettings,
    StateLayout,
    TracedStep,
    state_layout,
    trace_step,
)
from galore_fx.passes.pass_runner import Effect, PassRecord
from galore_fx.runtime.blockwise import BLOCK
from galore_fx.runtime.optimizer_state import SCALES, StateFormat
from galore_fx.runtime.projected_parameter import ProjectedParameter
from galore_fx.runtime.quantized_tensor import QuantizedTensor
from galore_fx.runtime.repetition import alike
from galore_fx.runtime.subspace import add_back_projection_, project

# What a step over 8-bit states decodes at once: its float32 temporaries are at most so long.
SLICE_ELEMENTS = 2**20
# Scalars of this many different steps are kept: parameters that lag behind (unused in a step) have their own.
_NUM_CACHED_STEPS = 8


@dataclasses.dataclass
class Variants:
    """What has been compiled.

    Attributes:
        steps: by class, settings, projected or not; several where the step branches on a hyper-parameter.
        rounding: the end of steps over weights in 8 bits.
    """

    steps: dict[object, list["CompiledUpdate"]] = dataclasses.field(default_factory=dict)
    rounding: WeightRounding = dataclasses.field(default_factory=WeightRounding)


# Those of the process, for all its models.
_VARIANTS = Variants()
# Step counts at which a class is asked for other branches than the one it takes now.
_PROBED_STEPS = (0.0, 1.0, 10.0, 100.0, 1e4, 1e6)
_STEP = f"{STATE_PREFIX}step"
# Traced branches by class, settings and numbers: a budget is tried with many plans of one optimizer.
_TRACED: dict[object, list[TracedStep]] = {}


class UpdateCompiler:
    """The updates of one model's optimizer.

    Attributes:
        optimizer_class: the class whose step is lowered.

    Args:
        optimizer_class: the same.
        defaults: its instance's ``defaults``: which keys of a param group are its settings. Others, such as a
            scheduler's ``initial_lr`` or a group's name, are nobody's business here.
        variants: where compiled steps are kept; those of the process by default.
        state_bits: as of a recipe.
    """

    def __init__(
        self,
        optimizer_class: type[torch.optim.Optimizer],
        defaults: Mapping[str, Any],
        variants: Variants | None = None,
        state_bits: int | None = None,
    ) -> None:
        self.optimizer_class = optimizer_class
        self._variants = _VARIANTS if variants is None else variants
        self._defaults = defaults
        self._state_bits = state_bits
        self._layouts: dict[object, StateLayout] = {}
        self._chosen: dict[object, tuple[CompiledUpdate, int]] = {}
        self._used: set[CompiledUpdate] = set()

    @property
    def num_graphs(self) -> int:
        """Graphs this model has used: one per outcome of the step's branches, per projected or not."""
        return len(self._used)

    def read(self, group: Mapping[str, Any]) -> GroupSettings:
        """The settings of a param group as they are now, for ``layout`` and ``update``."""
        return GroupSettings.read({key: value for key, value in group.items() if key in self._defaults})

    def layout(self, settings: GroupSettings, group: Mapping[str, Any]) -> StateLayout:
        """What the class keeps per parameter under these settings."""
        # Whether a state exists can hang on a number being zero: SGD keeps a buffer only with momentum.
        key = settings.switches, tuple(name for name, value in settings.floats.items() if value)
        if key not in self._layouts:
            layout = state_layout(self.optimizer_class, group)
            self._layouts[key] = dataclasses.replace(layout, format=self._format(group, settings, layout))
        return self._layouts[key]

    def _format(self, group: Mapping[str, Any], settings: GroupSettings, layout: StateLayout) -> StateFormat:
        if self._state_bits != 8:
            return StateFormat(self._state_bits)
        scalars = _scalars(settings, layout)
        branches = []
        for traced in self._branches(group, settings, layout, scalars):
            lowered = lower_to_subspace(traced, projected=True)
            branches.append((lowered, lowered.prologue(*scalars.values(), 1.0)[: lowered.num_slots]))
        return StateFormat(8, frozenset(never_negative(branches, list(layout.initial))))

    def check(self, group: Mapping[str, Any]) -> None:
        """Traces and lowers a step without compiling it, so that what cannot be lowered fails at once.

        Raises:
            OptimizerError: the class cannot be lowered.
        """
        settings = self.read(group)
        layout = self.layout(settings, group)
        try:
            for traced in self._branches(group, settings, layout, _scalars(settings, layout)):
                lower_to_subspace(traced, projected=True)
        except OptimizerError as error:
            raise OptimizerError(f"{self.optimizer_class.__name__} cannot be lowered: {error}") from error

    def prepare(self, group: Mapping[str, Any]) -> None:
        """Traces and lowers the steps of a group now; the first update of each kind only compiles."""
        settings = self.read(group)
        layout = self.layout(settings, group)
        values = (*settings.floats.values(), *layout.scalars.values())
        for projected in (True, False):
            for quantized in {False, layout.format.bits == 8}:
                self._choose(group, settings, layout, values, projected, None in layout.initial.values(), quantized)

    def pass_records(self, group: Mapping[str, Any], *, projected: bool) -> list[PassRecord]:
        """What each pass makes of the step of a parameter, for ``explain``; nothing is compiled."""
        settings = self.read(group)
        layout = self.layout(settings, group)
        scalars = _scalars(settings, layout)
        start = time.perf_counter()
        traced = self._branches(group, settings, layout, scalars)
        traced_at = time.perf_counter()
        lowered = [lower_to_subspace(step, projected=projected) for step in traced]
        lowered_at = time.perf_counter()
        merged = merge_branches(lowered, projected=projected)
        sizes = [
            sum(len(step.gm.graph.nodes) for step in traced),
            sum(len(step.prologue.graph.nodes) + len(step.body.graph.nodes) for step in lowered),
            sum(len(step.prologue.graph.nodes) for step in lowered) + len(merged.graph.nodes),
        ]
        where = "in the subspace" if projected else "at full rank"
        records = [
            PassRecord("trace_step", traced_at - start, 0, sizes[0], Effect(len(scalars), "live numbers")),
            PassRecord(
                "lower_to_subspace",
                lowered_at - traced_at,
                sizes[0],
                sizes[1],
                Effect(len(layout.initial), f"states {where}"),
            ),
            PassRecord(
                "merge_branches",
                time.perf_counter() - lowered_at,
                sizes[1],
                sizes[2],
                Effect(len(traced), "branches in one body"),
            ),
        ]
        if layout.format.bits == 8:
            start = time.perf_counter()
            quantized = quantize_states(merged, list(layout.initial), layout.format.unsigned)
            words = f"states in 8 bits, {len(layout.format.unsigned)} without a sign"
            num_nodes = len(quantized.graph.nodes)
            effect = Effect(len(layout.initial), words)
            records.append(PassRecord("quantize_states", time.perf_counter() - start, sizes[2], num_nodes, effect))
        return records

    def update(
        self,
        weight: Tensor,
        grad: Tensor,
        state: dict[str, Tensor],
        group: Mapping[str, Any],
        settings: GroupSettings,
        record: ProjectedParameter | None,
        scale: float,
        *,
        first: bool,
        rounding_key: int | None = None,
    ) -> None:
        """One optimizer step of one parameter, in place.

        Args:
            weight: W, (m, n) if projected, else any shape.
            grad: R if projected, else the full gradient; consumed.
            state: the state tensors (shape of ``grad``) and 0-d scalar states, changed in place.
            group: the param group.
            settings: what ``read`` made of it in this step.
            record: the projection, None for full rank.
            scale: factor of the back-projected update.
            first: whether this parameter has never been updated.
            rounding_key: of the random numbers that round a weight in 8 bits; None rounds it to the nearest.
        """
        layout = self.layout(settings, group)
        values = (*settings.floats.values(), *[float(state[name]) for name in layout.scalars])
        born = first and None in layout.initial.values()
        quantized = layout.format.is_quantized(grad.numel())
        key = (record is not None, born, quantized, settings.switches, values)
        chosen = self._chosen.get(key)
        if chosen is None:
            if len(self._chosen) >= _NUM_CACHED_STEPS:
                self._chosen.clear()
            chosen = self._chosen[key] = self._choose(
                group, settings, layout, values, record is not None, born, quantized
            )
            self._used.add(chosen[0])
        compiled, branch = chosen
        tensors = [state[name] for name in layout.initial]
        compiled(branch, weight, grad, tensors, state, (*values, scale), record, rounding_key)

    def _choose(
        self,
        group: Mapping[str, Any],
        settings: GroupSettings,
        layout: StateLayout,
        values: tuple[float, ...],
        projected: bool,
        born: bool,
        quantized: bool,
    ) -> tuple["CompiledUpdate", int]:
        """The compiled step and its branch that these numbers take, traced now if they are new."""
        names = (*settings.floats, *[STATE_PREFIX + name for name in layout.scalars])
        known = self._variants.steps.setdefault(
            (self.optimizer_class, projected, quantized, settings.switches, names), []
        )
        for compiled in known:
            branch = compiled.branch_for(values, born)
            if branch is not None:
                return compiled, branch
        traced = self._branches(group, settings, layout, dict(zip(names, values, strict=True)))
        unsigned = layout.format.unsigned if quantized else None
        compiled = CompiledUpdate(traced, self._variants.rounding, projected=projected, unsigned=unsigned)
        known.append(compiled)
        branch = compiled.branch_for(values, born)
        assert branch is not None, f"{self.optimizer_class.__name__} was traced at {values} and does not hold there"
        return compiled, branch

    def _branches(
        self, group: Mapping[str, Any], settings: GroupSettings, layout: StateLayout, scalars: Mapping[str, float]
    ) -> list[TracedStep]:
        """The step for these numbers, and its other branches at other step counts and at a parameter's first step."""
        key = self.optimizer_class, settings.switches, tuple(scalars.items()), tuple(layout.initial.items())
        if key in _TRACED:
            return _TRACED[key]
        found: list[TracedStep] = []
        for first in (False, True) if None in layout.initial.values() else (False,):
            for step in (None, *_PROBED_STEPS) if _STEP in scalars else (None,):
                probe = dict(scalars) if step is None else {**scalars, _STEP: step}
                values = tuple(probe.values())
                if not any(traced.first == first and traced.holds_for(values) for traced in found):
                    found.append(trace_step(self.optimizer_class, group, layout, probe, first=first))
        if len(_TRACED) >= _NUM_CACHED_STEPS:
            _TRACED.clear()
        _TRACED[key] = found
        return found


class CompiledUpdate:
    """One lowered step with all its branches; the body is compiled by Inductor at the first call, for any length.

    Args:
        traced: the branches.
        rounding: for weights in 8 bits.
        projected: whether the parameter is projected.
        unsigned: where the states are in 8 bits, those that are never negative.
    """

    def __init__(
        self,
        traced: Sequence[TracedStep],
        rounding: WeightRounding,
        *,
        projected: bool,
        unsigned: frozenset[str] | None = None,
    ) -> None:
        self._traced = traced
        self._rounding = rounding
        self._lowered = [lower_to_subspace(step, projected=projected) for step in traced]
        assert all(lowered.scalars[-1] == SCALE for lowered in self._lowered)
        self._new_scalars = traced[0].new_scalars
        self._needs_weight = any(lowered.needs_weight for lowered in self._lowered)
        body = merge_branches(self._lowered, projected=projected)
        self._is_quantized = unsigned is not None
        if unsigned is not None:
            body = quantize_states(body, traced[0].new_tensors, unsigned)
        self._body: Callable[..., Any] = torch.compile(body, fullgraph=True, dynamic=True)
        self._numbers = functools.lru_cache(_NUM_CACHED_STEPS)(self._compute_numbers)

    def branch_for(self, values: tuple[float, ...], born: bool) -> int | None:
        """Which branch these numbers take, None where none of them holds."""
        taken = (i for i, step in enumerate(self._traced) if step.first == born and step.holds_for(values))
        return next(taken, None)

    def __call__(
        self,
        branch: int,
        weight: Tensor,
        grad: Tensor,
        tensors: list[Tensor],
        state: dict[str, Tensor],
        values: tuple[float, ...],
        record: ProjectedParameter | None,
        rounding_key: int | None,
    ) -> None:
        """Runs prologue, body and back-projection; the other arguments are those of ``UpdateCompiler.update``."""
        dtype, device = _compute_dtype(weight.dtype), weight.device
        numbers, factor, new_scalars = self._numbers(branch, values, dtype, device)
        in_subspace = [project(weight, record.basis, record.dim)] if record and self._needs_weight else []
        if self._is_quantized:
            scales = [state[name + SCALES] for name in self._traced[0].new_tensors]
            self._run_quantized([grad] if record else [weight, grad], tensors, scales, in_subspace, numbers)
            update = grad
        elif record is None:
            self._body(*_flat([weight, grad, *tensors]), numbers)
        else:
            update = self._body(*_flat([grad, *tensors, *in_subspace]), numbers).view(grad.shape)
        if record is not None and isinstance(weight, QuantizedTensor):
            self._rounding.add_back_projection_(weight, update, record.basis, record.dim, factor, rounding_key)
        elif record is not None:
            add_back_projection_(weight, update, record.basis, record.dim, factor)
        for name, value in zip(self._new_scalars, new_scalars, strict=True):
            state[name].fill_(value)

    def _run_quantized(
        self, whole: list[Tensor], codes: list[Tensor], scales: list[Tensor], read: list[Tensor], numbers: Tensor
    ) -> None:
        """The body over whole blocks, a slice at a time, so that what it decodes stays small.

        Args:
            whole: tensors of one element per code, which are written: weight if unprojected, gradient.
            codes, scales: of each state.
            read: tensors like ``whole`` that are only read.
            numbers: of the body.
        """
        flat = [tensor.contiguous().view(-1).detach() for tensor in (*whole, *read)]
        num_elements = flat[0].numel()
        num_whole = num_elements // BLOCK
        num_slices = -(-num_whole * BLOCK // SLICE_ELEMENTS)
        for part in alike(range(num_slices)):
            blocks = slice(part * num_whole // num_slices, (part + 1) * num_whole // num_slices)
            elements = slice(blocks.start * BLOCK, blocks.stop * BLOCK)
            self._run_blocks(
                [tensor[elements] for tensor in flat],
                len(whole),
                [code[elements] for code in codes],
                [scale[blocks] for scale in scales],
                numbers,
            )
        rest = num_elements - num_whole * BLOCK
        if rest:
            # The last block in part: in copies, of two blocks, since a length of one would be compiled for itself.
            padded = [functional.pad(tensor[-rest:], (0, 2 * BLOCK - rest)) for tensor in flat]
            last_codes = [functional.pad(code[-BLOCK:], (0, BLOCK)) for code in codes]
            last_scales = [functional.pad(scale[-1:], (0, 1)) for scale in scales]
            self._run_blocks(padded, len(whole), last_codes, last_scales, numbers)
            for target, source, length in [
                *((target, source, rest) for target, source in zip(flat[: len(whole)], padded, strict=False)),
                *((target, source, BLOCK) for target, source in zip(codes, last_codes, strict=True)),
                *((target, source, 1) for target, source in zip(scales, last_scales, strict=True)),
            ]:
                target[-length:] = source[:length]
        for tensor, made in zip(whole, flat, strict=False):
            if not tensor.is_contiguous():
                tensor.copy_(made.view(tensor.shape))

    def _run_blocks(
        self, whole: list[Tensor], num_written: int, codes: list[Tensor], scales: list[Tensor], numbers: Tensor
    ) -> None:
        # Detached, as in ``_flat``: some are slices of a whole and some copies, which is all the same here.
        in_blocks = [tensor.view(-1, BLOCK).detach() for tensor in (*whole[:num_written], *codes, *whole[num_written:])]
        scales = [scale.detach() for scale in scales]
        for tensor in in_blocks:
            torch._dynamo.mark_static(tensor, 1)
        num_first = num_written + len(codes)
        self._body(*in_blocks[:num_first], *scales, *in_blocks[num_first:], numbers)

    def _compute_numbers(
        self, branch: int, values: tuple[float, ...], dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, float, tuple[float, ...]]:
        lowered = self._lowered[branch]
        out = lowered.prologue(*values)
        slots, factor, new_scalars = out[: lowered.num_slots], out[lowered.num_slots], out[lowered.num_slots + 1 :]
        numbers = numbers_of(self._lowered, branch, slots)
        return torch.tensor(numbers, dtype=dtype).to(device), factor, tuple(new_scalars)


def _scalars(settings: GroupSettings, layout: StateLayout) -> dict[str, float]:
    """The group's numbers and the initial ones of the state, by their names in a traced step."""
    return {**settings.floats, **{STATE_PREFIX + name: value for name, value in layout.scalars.items()}}


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Arithmetic is done in float32 at least, whatever is stored."""
    return torch.promote_types(dtype, torch.float32)


def _flat(tensors: list[Tensor]) -> list[Tensor]:
    """Flattened views where all are contiguous; as they are where one is not, since a copy would lose the update.

    Detached, and so no views to Dynamo: it would tell matrices from vectors by what they are views of.
    """
    return [t.view(-1).detach() for t in tensors] if all(t.is_contiguous() for t in tensors) else tensors
