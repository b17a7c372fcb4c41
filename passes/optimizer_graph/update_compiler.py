"""Compiles updates once per optimizer class and setting, for all parameters: trace -> lower -> merge -> Inductor.

    prologue (host numbers)  ->  body (one fused kernel, any shape)  ->  W <- c W + back_project(L)

The body is elementwise, so one kernel with a dynamic length serves flattened parameters of every shape. If the step
branches on the step count, the body contains all branches.
"""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from galore_fx.errors import OptimizerError
from galore_fx.passes.optimizer_graph.add_residuals import ResidualStep
from galore_fx.passes.optimizer_graph.compiled_update import NUM_CACHED_STEPS, CompiledUpdate
from galore_fx.passes.optimizer_graph.lower_to_subspace import lower_to_subspace
from galore_fx.passes.optimizer_graph.merge_branches import merge_branches
from galore_fx.passes.optimizer_graph.quantize_states import never_negative, quantize_states
from galore_fx.passes.optimizer_graph.round_weights import CompiledRounding
from galore_fx.passes.optimizer_graph.trace_step import (
    STATE_PREFIX,
    GroupSettings,
    StateLayout,
    TracedStep,
    state_layout,
    trace_step,
)
from galore_fx.passes.pass_runner import Effect, PassRecord
from galore_fx.runtime.formats.state_format import StateFormat, residual_state
from galore_fx.runtime.remainder.scaled import Complement
from galore_fx.runtime.step.realised_movement import MovementProbe
from galore_fx.runtime.subspace.projected_parameter import ProjectedParameter


@dataclasses.dataclass
class Variants:
    """Cache of compiled steps.

    Attributes:
        steps: compiled steps by class, projected or not, 8-bit states or not, rounded or not, settings and names of
            the numbers; a list has several entries if the step branches on a hyper-parameter.
        rounding: the compiled end of steps on weights in 16 and 8 bits.
    """

    steps: dict[object, list["CompiledUpdate"]] = dataclasses.field(default_factory=dict)
    rounding: CompiledRounding = dataclasses.field(default_factory=CompiledRounding)


# Shared by all models of the process.
_VARIANTS = Variants()
# Step counts at which a class is traced to discover its other branches.
_PROBED_STEPS = (0.0, 1.0, 10.0, 100.0, 1e4, 1e6)
_STEP = f"{STATE_PREFIX}step"
# Traced branches by class, settings, numbers and initial states: the planner tries many plans of one optimizer.
_TRACED: dict[object, list[TracedStep]] = {}


class UpdateCompiler:
    """Compiles and runs the updates of one model's optimizer.

    Attributes:
        optimizer_class: the class whose step is lowered.

    Args:
        optimizer_class: the class whose step is lowered.
        defaults: ``defaults`` of the optimizer, whose keys are its settings. Other keys of a param group, such as a
            scheduler's ``initial_lr`` or a group's name, are ignored.
        variants: cache of compiled steps; by default the one shared by the process.
        state_bits: bits of the states, as in a recipe: 8, 32, or None for the dtype of the weight.
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
        """Number of compiled steps that this model has used."""
        return len(self._used)

    def read(self, group: Mapping[str, Any]) -> GroupSettings:
        """Reads the current settings of a param group, for ``layout`` and ``update``."""
        return GroupSettings.read({key: value for key, value in group.items() if key in self._defaults})

    def layout(self, settings: GroupSettings, group: Mapping[str, Any]) -> StateLayout:
        """Returns the state that the class keeps per parameter under these settings.

        Raises:
            OptimizerError: the state of the class cannot be kept in a subspace.
        """
        # Whether a state exists can depend on a number being zero: SGD keeps a buffer only with momentum.
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
        """Traces and lowers a step without compiling it, so that an unsupported optimizer fails early.

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
        """Traces and lowers the steps of a group, so that the first update of each kind only has to compile.

        Raises:
            OptimizerError: the class cannot be lowered.
        """
        settings = self.read(group)
        layout = self.layout(settings, group)
        values = (*settings.floats.values(), *layout.scalars.values())
        for projected in (True, False):
            for quantized in {False, layout.format.bits == 8}:
                self._choose(group, settings, layout, values, projected, None in layout.initial.values(), quantized)

    def pass_records(self, group: Mapping[str, Any], *, projected: bool) -> list[PassRecord]:
        """Returns the effect of each pass on the step of a parameter, for ``explain``; compiles nothing.

        Raises:
            OptimizerError: the class cannot be lowered.
        """
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
        rounding_key: Tensor | None = None,
        entries: Tensor | None = None,
        complement: Complement | None = None,
        probe: MovementProbe | None = None,
    ) -> None:
        """Applies one optimizer step to one parameter, in place.

        Args:
            weight: W, (m, n) if projected, otherwise any shape.
            grad: R if projected, otherwise the full gradient; consumed.
            state: state tensors (the shape of ``grad``, or 8-bit codes and their scales) and 0-d scalar states,
                changed in place.
            group: the param group.
            settings: the settings that ``read`` returned for the group in this step.
            record: record of the projected weight; None for full rank.
            scale: factor of the back-projected update.
            first: whether this is the parameter's first update.
            rounding_key: 0-d int32 key of the random numbers that round a weight in 16 or 8 bits; None rounds to
                nearest.
            entries: gradient entries of the record's residual, (m, k); consumed. None skips the residual.
            complement: the gradient without its projection, scaled like the rest of the step; consumed.
            probe: compares the realised with the intended movement on some elements.
        """
        layout = self.layout(settings, group)
        projected = record is not None
        rounded = rounding_key is not None and not projected
        compiled, branch, values = self._pick(
            group, settings, layout, state, grad.numel(), projected, first, rounded=rounded
        )
        residual = None
        if entries is not None and record is not None:
            own = residual_state(state)
            is_first = float(own.get("started", 1.0)) == 0.0
            step = self._pick(group, settings, layout, own, entries.numel(), True, is_first)
            residual = ResidualStep(*step, scale, [own[name] for name in layout.initial], own, record, entries)
            residual.read_weight(weight)
        tensors = [state[name] for name in layout.initial]
        values = (*values, scale)
        compiled(branch, weight, grad, tensors, state, values, record, rounding_key, complement, residual, probe)

    def _pick(
        self,
        group: Mapping[str, Any],
        settings: GroupSettings,
        layout: StateLayout,
        state: Mapping[str, Tensor],
        num_elements: int,
        projected: bool,
        first: bool,
        *,
        rounded: bool = False,
    ) -> tuple["CompiledUpdate", int, tuple[float, ...]]:
        """Returns the compiled step for a state, its branch and its numbers."""
        values = (*settings.floats.values(), *[float(state[name]) for name in layout.scalars])
        born = first and None in layout.initial.values()
        quantized = layout.format.is_quantized(num_elements)
        key = (projected, born, quantized, rounded, settings.switches, values)
        chosen = self._chosen.get(key)
        if chosen is None:
            if len(self._chosen) >= NUM_CACHED_STEPS:
                self._chosen.clear()
            chosen = self._chosen[key] = self._choose(
                group, settings, layout, values, projected, born, quantized, rounded=rounded
            )
            self._used.add(chosen[0])
        return *chosen, values

    def _choose(
        self,
        group: Mapping[str, Any],
        settings: GroupSettings,
        layout: StateLayout,
        values: tuple[float, ...],
        projected: bool,
        born: bool,
        quantized: bool,
        *,
        rounded: bool = False,
    ) -> tuple["CompiledUpdate", int]:
        """Returns the compiled step and the branch for these numbers; traces them if no known step holds for them."""
        names = (*settings.floats, *[STATE_PREFIX + name for name in layout.scalars])
        known = self._variants.steps.setdefault(
            (self.optimizer_class, projected, quantized, rounded, settings.switches, names), []
        )
        for compiled in known:
            branch = compiled.branch_for(values, born)
            if branch is not None:
                return compiled, branch
        traced = self._branches(group, settings, layout, dict(zip(names, values, strict=True)))
        unsigned = layout.format.unsigned if quantized else None
        compiled = CompiledUpdate(
            traced, self._variants.rounding, projected=projected, unsigned=unsigned, rounded=rounded
        )
        known.append(compiled)
        branch = compiled.branch_for(values, born)
        assert branch is not None, f"{self.optimizer_class.__name__} was traced at {values} and does not hold there"
        return compiled, branch

    def _branches(
        self, group: Mapping[str, Any], settings: GroupSettings, layout: StateLayout, scalars: Mapping[str, float]
    ) -> list[TracedStep]:
        """Traces the step for these numbers, and its branches at other step counts and at a parameter's first step."""
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
        if len(_TRACED) >= NUM_CACHED_STEPS:
            _TRACED.clear()
        _TRACED[key] = found
        return found


def _scalars(settings: GroupSettings, layout: StateLayout) -> dict[str, float]:
    """Returns the numbers of the group and the initial scalar states, by their names in a traced step."""
    return {**settings.floats, **{STATE_PREFIX + name: value for name, value in layout.scalars.items()}}
