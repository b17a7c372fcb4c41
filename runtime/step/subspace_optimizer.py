"""The optimizer that steps a compiled model: the user's ``torch.optim`` class, lowered into subspaces.

A *window* is the time between two calls of ``step()``: one forward and backward, or several micro-batches.

    deferred      backward: R and full gradients accumulate  |  step(): norm, clip, update all, refresh
    in-backward   backward: each parameter is updated when its gradient is complete  |  step(): closes the window

A due basis is refreshed in one of two ways. Exact SVD: the backwards of the window deliver the full gradients of due
weights; ``step()`` computes the new basis, projects with it and updates. Subspace iteration: the backward of the first
micro-batch also delivers the sketch ``G^T G P``; the update uses the old basis, and the new one applies from the next
window on. The basis is thus constant within a window, and accumulated gradients are exact.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from galore_fx.errors import UsageError
from galore_fx.runtime.counters import Counters
from galore_fx.runtime.dispatch.guards import refuse_other_optimizers, refuse_scaler, warn_of_processes
from galore_fx.runtime.formats.state_format import RESIDUAL
from galore_fx.runtime.layers.merge_factors import FactorMerge
from galore_fx.runtime.remainder.scaled import Complement, complement_at
from galore_fx.runtime.remainder.warm_up import ResidualTraining
from galore_fx.runtime.step.backward_updates import BackwardUpdates
from galore_fx.runtime.step.deferred_gradients import DeferredGradients
from galore_fx.runtime.step.gradient_hooks import GradientWatch, WriteWatch, weak_hook, weak_method
from galore_fx.runtime.step.late_parameters import LateParameters, NamedParameters
from galore_fx.runtime.step.parameter_states import ParameterStates
from galore_fx.runtime.step.state_dict import STATE_VERSION, restore
from galore_fx.runtime.step.update_protocol import Updates
from galore_fx.runtime.step.weight_rounding import WeightRounding
from galore_fx.runtime.subspace.moment_transfer import reset_moments, rotate_moments, rotation_between
from galore_fx.runtime.subspace.projected_parameter import ProjectedParameter
from galore_fx.runtime.subspace.refresh_criteria import RefreshCriterion
from galore_fx.runtime.subspace.refresh_queue import FixedSchedule, RefreshCost, RefreshLimits, RefreshQueue
from galore_fx.runtime.subspace.refresher import BasisRefresh, Observer

_NOTHING: AbstractContextManager[None] = nullcontext()


class SubspaceOptimizer(torch.optim.Optimizer):
    """Steps all parameters of a compiled model.

    Attributes:
        counters: counts updates, refreshes and skipped steps.
        grad_norm: norm of all gradients in the last deferred step, before clipping; None before the first.

    Args:
        param_groups: param groups of the user's optimizer with the model's parameters. They are shared, not copied, so
            a scheduler of the user's instance also controls this one.
        defaults: defaults of the user's class, which schedulers read.
        updates: the lowered optimizer step.
        records: the projected parameters.
        layers: index of the region of each record; regions take turns to refresh.
        schedule: refresh schedule of the regions.
        criterion: decides with the schedule which bases are due.
        by_first_vector: measure stability by the first vectors of the bases instead of their overlap.
        limits: limits of the refreshes in one update.
        costs: refresh cost of each region.
        moments_on_refresh: treatment of a weight's states at a refresh, "keep", "rotate" or "reset".
        scale: factor of back-projected updates.
        in_backward: update inside the backward.
        max_grad_norm: norm to clip to before each update; None to not clip.
        rounding_seed: seed of the stochastic rounding of weights in 16 and 8 bits; None to round to nearest.
        named: returns the model's named parameters, to detect late ones; returns none if there is no model.
        merge: merges low-rank changes into frozen weights at intervals; None to never merge.
    """

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        defaults: dict[str, Any],
        *,
        updates: Updates,
        records: list[ProjectedParameter],
        layers: list[int],
        schedule: FixedSchedule,
        criterion: RefreshCriterion,
        by_first_vector: bool,
        limits: RefreshLimits,
        costs: Mapping[int, RefreshCost],
        moments_on_refresh: str,
        scale: float,
        in_backward: bool,
        max_grad_norm: float | None,
        rounding_seed: int | None,
        named: NamedParameters,
        merge: FactorMerge | None = None,
    ) -> None:
        super().__init__([{**group} for group in param_groups], defaults)
        self.param_groups = param_groups
        self.counters = Counters()
        self.grad_norm: float | None = None
        self.in_backward = in_backward
        self.max_grad_norm = max_grad_norm
        self._updates = updates
        self._records = {id(record.weight): record for record in records}
        self._layers = {id(record.weight): layer for record, layer in zip(records, layers, strict=True)}
        self._merge = merge
        self._moments_on_refresh, self._scale = moments_on_refresh, scale
        self.observe: Observer = lambda _what, _grad: _NOTHING
        self._watch, self._written = GradientWatch(), WriteWatch()
        self._numbers = {id(p): i for i, p in enumerate(self._parameters())}
        self.rounding = WeightRounding(rounding_seed, self._numbers, self.counters)
        self.refreshes = BasisRefresh(
            self._records,
            RefreshQueue(self._layers, schedule, limits, criterion, costs),
            self.counters,
            by_first_vector=by_first_vector,
            observe=lambda what, grad: self.observe(what, grad),
            numbers=self._numbers,
            transfer=self._transfer_moments,
        )
        self._groups = {id(p): group for group in self.param_groups for p in group["params"]}
        self._states = ParameterStates(updates, self.state, self._groups, self._records)
        self._backward = BackwardUpdates(
            self._records,
            self.refreshes,
            self.counters,
            self._groups,
            scale,
            self._update,
            observe=lambda what, grad: self.observe(what, grad),
        )
        gradients = DeferredGradients(self._parameters, self._records, self.refreshes)
        self._collect, self._holders = gradients.collect, gradients.holders
        self._residuals = ResidualTraining(records, self.state, self.counters, self._states.like)
        for parameter in self._parameters():
            if parameter.requires_grad:  # groups may list frozen ones
                self.state[parameter] = self._states.new(parameter)
        self.late = LateParameters(named, self.state, self.param_groups, weak_method(self, "_take_in"))
        self._hooked: set[int] = set()
        self._install_hooks()
        self._open_window()
        if records:
            refuse_other_optimizers(SubspaceOptimizer)
            self._step_supports_amp_scaling = True  # makes a GradScaler announce itself to step(), which rejects it

    # Public methods.

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the parameters (deferred), or closes the window whose backward has updated them.

        A deferred step with a gradient that is not finite updates no weight and no state, and counts as skipped.

        Args:
            closure: evaluates the model again and returns the loss; called first, with grad enabled. ``step`` returns
                its result, or None without a closure.

        Raises:
            UsageError: the caller is a GradScaler, which does not see projected gradients.
        """
        if self._records:
            refuse_scaler(self)
            warn_of_processes()
            self._written.warn_of_others(self._trained(), self._records)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            names = {key: record.name for key, record in self._records.items()}
            self.late.look(list(self._parameters()), names)
            newly_hooked = self._install_hooks()
            if self.in_backward:
                for parameter in newly_hooked:  # its gradient arrived before the hook
                    self._backward.take(parameter, parameter)
                self._backward.finish()
                self.refreshes.apply_rest()
                self._close_window(set(self._backward.updated))
            else:
                self._step_deferred()
        return loss

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clips the joint 2-norm of all gradients: R for projected weights, full gradients for other parameters.

        ``torch.nn.utils.clip_grad_norm_(model.parameters())`` sees only full-rank gradients; call this instead.

        Args:
            max_norm: upper limit of the norm; larger gradients are scaled down to it.

        Returns:
            The norm before clipping, 0-d.

        Raises:
            UsageError: the optimizer updates inside the backward, which consumes the gradients.
        """
        if self.in_backward:
            raise UsageError(
                "clip_grad_norm_ needs all gradients at once, but update='in-backward' consumes each inside the "
                "backward; compile with update='deferred' to clip"
            )
        with torch.no_grad():
            grads = [grad for _, grad in self._collect()]
            norm = torch.nn.utils.get_total_norm(grads)
            torch.nn.utils.clip_grads_with_norm_(
                [holder for holder in self._holders() if holder.grad is not None], max_norm, norm
            )
            self._watch.forget()
        return norm

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group during construction; a later group would have neither states nor a plan.

        Raises:
            UsageError: the optimizer has been constructed.
        """
        if hasattr(self, "_groups"):
            raise UsageError(
                "add_param_group after compile: give all parameters to galore_fx.compile, as an optimizer instance "
                "with the groups you want"
            )
        super().add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears all gradients of the window, including projected gradients and sketches."""
        super().zero_grad(set_to_none)
        for record in self._records.values():
            record.clear()
        self.refreshes.forget()

    def request_refresh(self) -> None:
        """Makes all bases due in the current window; call it before the first forward of the window."""
        self.refreshes.queue.request(self._layers, self.counters.num_updates)
        self.refreshes.set_forms()

    def limit_refreshes(self, limit: int | None) -> None:
        """Limits the regions that refresh in one update, None for no limit; call it before a window's first forward."""
        self.refreshes.queue.limits = dataclasses.replace(self.refreshes.queue.limits, num_layers=limit)
        self.refreshes.set_forms()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as ``torch.optim`` does, with the counters and pending refreshes under ``galore_fx``."""
        saved = super().state_dict()
        saved["galore_fx"] = {
            "version": STATE_VERSION,
            **dataclasses.asdict(self.counters),
            "late_parameters": list(self.late.names),
            **self.refreshes.queue.state(self._numbers),
        }
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a saved state in place, with the dtypes kept; the resumed run is bit-identical.

        Raises:
            OptimizerError: the state belongs to another optimizer or to other parameters; nothing is changed.
        """
        saved = state_dict.get("galore_fx", {})
        give_back = self.late.take_again(saved.get("late_parameters", ()))
        num_updates = saved.get("num_updates", self.counters.num_updates)
        go_back = self._residuals.set_learning(num_updates)
        try:
            extra = restore(self.state, self.param_groups, state_dict, self.refreshes.sharers())
        except BaseException:
            go_back()
            give_back()
            raise
        self.counters.load(extra)
        self.refreshes.queue.load_state(extra, list(map(id, self._parameters())))
        self.zero_grad()
        self._backward.close_window()
        self.refreshes.set_forms()

    @property
    def records(self) -> Iterable[ProjectedParameter]:
        """The projected parameters."""
        return self._records.values()

    # Windows.

    def _open_window(self) -> None:
        self.refreshes.queue.admit(self.counters.num_updates)
        self.refreshes.set_forms()

    def _close_window(self, updated: set[int]) -> None:
        """Ends a window in which the parameters with these ``id`` were updated; empty if the window was skipped."""
        self.zero_grad()
        self._states.close_window()
        self._watch.forget()
        self._backward.close_window()
        self._written.note(self._trained())
        if updated:
            self.refreshes.pass_on()
            if not self.counters.num_updates:
                self.late.name_unmoved(self._trained(), updated)
            self.counters.num_updates += 1
            self.rounding.after_update()
            self._residuals.set_learning(self.counters.num_updates)
            if self._merge is not None:
                self._merge.after_update(self.counters.num_updates, self._records, self.state, self._states.like)
            self._open_window()

    # Deferred.

    def _step_deferred(self) -> None:
        self._watch.warn_of_changes(self._parameters())
        gradients = self._collect()
        if not gradients:
            return
        self._watch.warn_of_missing((record.weight for record in self.records), (p for p, _ in gradients))
        norm = torch.nn.utils.get_total_norm([grad for _, grad in gradients])
        self.grad_norm = float(norm)
        if not torch.isfinite(norm):
            self.counters.num_skipped += 1
            self._close_window(set())
            return
        if self.max_grad_norm is not None and self.grad_norm > self.max_grad_norm:
            self.clip_grad_norm_(self.max_grad_norm)
        for parameter, grad in gradients:
            self._update(parameter, grad)
        self.refreshes.apply_sketches()
        self._close_window({id(parameter) for parameter, _ in gradients})

    # Hooks.

    def _install_hooks(self) -> list[nn.Parameter]:
        """Installs hooks on trained parameters that have none and returns these; a frozen one cannot have any."""
        misses_some = not all(record.delivers_full for record in self.records)  # for code that clips parameters' .grad
        new = [parameter for parameter in self._trained() if id(parameter) not in self._hooked]
        self._hooked.update(map(id, new))
        for parameter in new:
            record = self._records.get(id(parameter))
            if record is not None:
                record.source_hook = weak_hook(self, "_keep_sketch", parameter)
                record.source.leaf.register_post_accumulate_grad_hook(record.source_hook)
            if record is None and misses_some and not self.in_backward:
                parameter.register_post_accumulate_grad_hook(weak_hook(self._watch, "note", parameter))
        if self.in_backward:
            self._backward.install(new)
        return new

    def _take_in(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        """Creates number, group and states of a parameter that is trained from now on."""
        self._numbers.setdefault(id(parameter), len(self._numbers))
        self._groups[id(parameter)] = group
        self.state[parameter] = self._states.new(parameter)

    def _keep_sketch(self, parameter: nn.Parameter, _leaf: Tensor) -> None:
        record = self._records[id(parameter)]
        self.refreshes.keep_sketch(record)
        if self.in_backward:
            self.refreshes.apply_after(record, self._backward.updated)

    # One parameter.

    def _update(self, parameter: nn.Parameter, grad: Tensor, complement: Complement | None = None) -> None:
        group = self._groups[id(parameter)]
        settings = self._states.settings(group)  # may add a state that the settings need now
        state = self.state[parameter]
        record = self._records.get(id(parameter))
        started = state.get("started")
        first = started is not None and float(started) == 0.0
        with self.observe("update", grad):
            if record is not None:
                self.refreshes.note_direction(record, grad)
            entries = self._residuals.entries(record, grad)
            if record is not None and entries is not None and record.residual_is_scaled:
                complement, entries = complement_at(record, entries, grad, group, self._scale), None
            self._updates.update(
                parameter,
                grad,
                state,
                group,
                settings,
                record,
                self._scale,
                first=first,
                rounding_key=self.rounding.key(parameter),
                entries=entries,
                complement=complement,
                probe=self.rounding.probe(parameter, projected=record is not None),
            )
        if started is not None:
            started.fill_(1.0)
            if entries is not None:
                state[f"{RESIDUAL}started"].fill_(1.0)

    def _transfer_moments(self, record: ProjectedParameter, basis: Tensor) -> None:
        """Adapts the states of a weight to a new basis, as ``moments_on_refresh`` requires."""
        state = self.state[record.weight]
        if self._moments_on_refresh == "reset":
            reset_moments(state, self._states.like(record.weight, record.leaf))
        elif self._moments_on_refresh == "rotate":
            group = self._groups[id(record.weight)]
            layout = self._updates.layout(self._states.settings(group), group)
            rotation = rotation_between(record.basis, basis, record.rank)
            rotate_moments(state, rotation, record.dim, record.leaf.shape, group, layout)

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._parameters() if parameter.requires_grad]

    def _parameters(self) -> Iterable[nn.Parameter]:
        return (p for group in self.param_groups for p in group["params"])
