"""Checks each training call of a compiled model: plans for the first batch, refuses larger ones, watches the peak."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from galore_fx.assembly.assemble import Assembled
from galore_fx.assembly.compiled_model import Compiled
from galore_fx.assembly.decisions import decide
from galore_fx.assembly.plan_parameters import check_budget
from galore_fx.assembly.request import Request
from galore_fx.assembly.user_optimizer import for_a_copy
from galore_fx.plan_record import Plan
from galore_fx.planner.activation_search import PolicySearch
from galore_fx.planner.batch_guard import PlannedBatch, Replan
from galore_fx.planner.budget_search import decide_for_sample
from galore_fx.planner.verify_peak import watch_peak
from galore_fx.runtime.measure.peak_watch import PeakWatch
from galore_fx.simulation.fake_model import meta_copy
from galore_fx.simulation.sample import TrainingCall
from galore_fx.simulation.simulator import StepSimulator
from galore_fx.units import format_bytes

_LOGGER = logging.getLogger(__name__)
Check = Callable[[tuple[Any, ...], dict[str, Any]], None]
PlanFirst = Callable[[tuple[Any, ...], dict[str, Any]], tuple[Check, PeakWatch | None]]


class TrainingCheck:
    """Checks the arguments of each training call before it runs.

    Args:
        planned: refuses batches that the plan does not cover; None if no batch is planned (yet).
        plan_first: plans for the first batch and returns the other two; None if that is not needed.
        watch: measures an early step; None for no measurement.
    """

    def __init__(self, planned: Check | None, plan_first: PlanFirst | None, watch: PeakWatch | None) -> None:
        self._planned, self._plan_first, self._watch = planned, plan_first, watch

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Checks one training call.

        Raises:
            UsageError: a step with this batch would exceed the plan.
            BudgetError: no plan for the first batch fits the budget.
            ModelError: the first batch cannot be simulated.
        """
        if self._plan_first is not None:
            self._planned, self._watch = self._plan_first(args, kwargs)
            self._plan_first = None
        if self._planned is not None:
            self._planned(args, kwargs)
        if self._watch is not None:
            self._watch.forward_begins()


def plan_for_first_batch(model: nn.Module, request: Request, assembled: Assembled, compiled: Compiled) -> PlanFirst:
    """Returns a function that plans for the first batch of a compiled model: activation policy and refresh limit.

    Args:
        model: the compiled model.
        request: the user's request, with a budget and without a sample.
        assembled: decisions made without a batch, and the blocks, whose policy is set.
        compiled: object whose plan is replaced and whose optimizer gets the refresh limit.
    """
    decisions = assembled.decisions

    def plan(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Check, PeakWatch | None]:
        sample = TrainingCall(args, kwargs)
        settled = {"update": decisions.recipe.update}
        if decisions.recipe.projects:
            settled["rank"] = decisions.recipe.rank  # type: ignore[assignment]
        recipe = decisions.recipe if not isinstance(request.recipe, str) else request.recipe
        overrides = {**request.overrides, **settled} if isinstance(recipe, str) else {}
        asked = dataclasses.replace(
            request,
            budget=decisions.plan.budget_bytes,
            sample=sample,
            recipe=recipe,
            overrides=overrides,
            optimizer=for_a_copy(decisions.optimizer),
            device=next(model.parameters()).device.type,
        )
        made = decide_for_sample(meta_copy(model), asked).plan
        check_budget(made)
        assembled.installed.set_policy(made.activation_policy)
        compiled.optimizer.limit_refreshes(made.recipe.refresh_limit)
        compiled.plan = made
        replan = plan_for_arguments(model, compiled)
        return PlannedBatch(model, made.batch, replan), watch_peak(model, compiled.optimizer, made)

    return plan


def plan_for_arguments(model: nn.Module, compiled: Compiled) -> Replan:
    """Returns a function that plans steps with arguments that the sample lacked, all other settings being fixed.

    Args:
        model: the compiled model.
        compiled: object with the plan in force; a new plan within the budget replaces it.
    """

    def replan(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan:
        plan, device = compiled.plan, next(model.parameters()).device.type
        given = Request(recipe=plan.recipe, optimizer=compiled.optimizer_choice)
        simulator = StepSimulator(
            meta_copy(model),
            TrainingCall(args, kwargs),
            keep_logits=plan.keep_logits,
            micro_batches=plan.micro_batches,
            device=device,
        )
        training = simulator.train(lambda fake, variants: decide(fake, given, variants))
        search = PolicySearch(training, plan, device, plan.reserve_bytes, plan.chosen)
        made = search.as_given()
        if made.within_budget:
            _LOGGER.info("a step with arguments that the sample had not takes %s", format_bytes(made.peak_bytes))
            compiled.plan = made
        return made

    return replan
