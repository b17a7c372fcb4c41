"""Compiled updates: trace -> lower -> Inductor, once per optimizer class and setting, shared by all parameters.

    prologue (host numbers)  ->  body (one fused kernel, any shape)  ->  W <- c W + back_project(L)

The body is elementwise, so parameters of every shape go through it flattened, and one kernel with a dynamic length
serves all of them.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from galore_fx.passes.optimizer_graph.lower_to_subspace import SCALE, LoweredStep, lower_to_subspace
from galore_fx.passes.optimizer_graph.trace_step import (
    STATE_PREFIX,
    GroupSettings,
    StateLayout,
    TracedStep,
    state_layout,
    trace_step,
)
from galore_fx.runtime.projected_parameter import ProjectedParameter
from galore_fx.runtime.subspace import add_back_projection_, project

# Scalars of this many different steps are kept: parameters that lag behind (unused in a step) have their own.
_NUM_CACHED_STEPS = 8


# Traced and compiled steps for all models of the process, by class, settings, projected or not, first step or not;
# several where the step branches on a number.
_VARIANTS: dict[object, list[tuple[TracedStep, "CompiledUpdate"]]] = {}


class UpdateCompiler:
    """The updates of one model's optimizer.

    Attributes:
        optimizer_class: the class whose step is lowered.

    Args:
        optimizer_class: the same.
        defaults: its instance's ``defaults``: which keys of a param group are its settings. Others, such as a
            scheduler's ``initial_lr`` or a group's name, are nobody's business here.
    """

    def __init__(self, optimizer_class: type[torch.optim.Optimizer], defaults: Mapping[str, Any]) -> None:
        self.optimizer_class = optimizer_class
        self._defaults = defaults
        self._layouts: dict[object, StateLayout] = {}
        self._chosen: dict[object, CompiledUpdate] = {}
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
            self._layouts[key] = state_layout(self.optimizer_class, group)
        return self._layouts[key]

    def check(self, group: Mapping[str, Any]) -> None:
        """Traces and lowers a step without compiling it, so that what cannot be lowered fails at once.

        Raises:
            OptimizerError: the class cannot be lowered.
        """
        settings = self.read(group)
        layout = self.layout(settings, group)
        scalars = {
            **settings.floats,
            **{STATE_PREFIX + name: value for name, value in layout.scalars.items()},
        }
        lower_to_subspace(trace_step(self.optimizer_class, group, layout, scalars, first=True), projected=True)

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
        """
        layout = self.layout(settings, group)
        values = (*settings.floats.values(), *[float(state[name]) for name in layout.scalars])
        born = first and None in layout.initial.values()
        key = (record is not None, born, settings.switches, values)
        compiled = self._chosen.get(key)
        if compiled is None:
            if len(self._chosen) >= _NUM_CACHED_STEPS:
                self._chosen.clear()
            compiled = self._variant(group, settings, layout, values, record is not None, born)
            self._chosen[key] = compiled
            self._used.add(compiled)
        compiled(weight, grad, [state[name] for name in layout.initial], state, (*values, scale), record)

    def _variant(
        self,
        group: Mapping[str, Any],
        settings: GroupSettings,
        layout: StateLayout,
        values: tuple[float, ...],
        projected: bool,
        born: bool,
    ) -> "CompiledUpdate":
        """The variant whose branches these numbers take, traced now if they are new."""
        names = (*settings.floats, *[STATE_PREFIX + name for name in layout.scalars])
        known = _VARIANTS.setdefault((self.optimizer_class, projected, born, settings.switches, names), [])
        for traced, compiled in known:
            if traced.holds_for(values):
                return compiled
        scalars = dict(zip(names, values, strict=True))
        traced = trace_step(self.optimizer_class, group, layout, scalars, first=born)
        compiled = CompiledUpdate(lower_to_subspace(traced, projected=projected), traced.new_scalars)
        known.append((traced, compiled))
        return compiled


class CompiledUpdate:
    """One lowered step; its body is compiled by Inductor at the first call, for any length."""

    def __init__(self, lowered: LoweredStep, new_scalars: tuple[str, ...]) -> None:
        assert lowered.scalars[-1] == SCALE
        self._lowered = lowered
        self._new_scalars = new_scalars
        self._body: Callable[..., Any] = torch.compile(lowered.body, fullgraph=True, dynamic=True)
        self._numbers = functools.lru_cache(_NUM_CACHED_STEPS)(self._compute_numbers)

    def __call__(
        self,
        weight: Tensor,
        grad: Tensor,
        tensors: list[Tensor],
        state: dict[str, Tensor],
        values: tuple[float, ...],
        record: ProjectedParameter | None,
    ) -> None:
        """Runs prologue, body and back-projection; the arguments are those of ``UpdateCompiler.update``."""
        numbers, factor, new_scalars = self._numbers(values, _compute_dtype(weight.dtype), weight.device)
        inputs = [grad, *tensors]
        if record is None:
            self._body(*_flat([weight, *inputs]), numbers)
        else:
            if self._lowered.needs_weight:
                inputs.append(project(weight, record.basis, record.dim))
            update = self._body(*_flat(inputs), numbers)
            add_back_projection_(weight, update.view(grad.shape), record.basis, record.dim, factor)
        for name, value in zip(self._new_scalars, new_scalars, strict=True):
            state[name].fill_(value)

    def _compute_numbers(
        self, values: tuple[float, ...], dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, float, tuple[float, ...]]:
        out = self._lowered.prologue(*values)
        num_slots = self._lowered.num_slots
        return (
            torch.tensor(out[:num_slots], dtype=dtype).to(device),
            out[num_slots],
            tuple(out[num_slots + 1 :]),
        )


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Arithmetic is done in float32 at least, whatever is stored."""
    return torch.promote_types(dtype, torch.float32)


def _flat(tensors: list[Tensor]) -> list[Tensor]:
    """Flattened views where all are contiguous; as they are where one is not, since a copy would lose the update."""
    return [t.view(-1) for t in tensors] if all(t.is_contiguous() for t in tensors) else tensors
