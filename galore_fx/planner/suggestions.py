"""Suggests changes when no plan fits: the budget, the batch, the sequence length, the dtype or the recipe."""

import dataclasses

import torch
from torch import nn

from galore_fx.assembly.decisions import Decisions, decide
from galore_fx.assembly.request import Request
from galore_fx.errors import ModelError, SettingError
from galore_fx.planner.activation_search import PolicySearch, deciding, largest_peak
from galore_fx.recipes.recipe import Recipe
from galore_fx.simulation.sample import batch_size, shortened
from galore_fx.simulation.simulator import StepSimulator
from galore_fx.units import format_bytes

_MAX_NUM_TRIALS = 4
SMALLEST = "q-galore"


def nearest_changes(
    model: nn.Module, request: Request, sample: object, smallest: Decisions, device: str
) -> tuple[str, ...]:
    """Returns changes, in words, with which the training would fit.

    A smaller batch and a shorter sequence are simulated. If the bytes kept through the step already exceed the budget,
    bfloat16 and a smaller recipe are suggested instead, from the kept bytes alone.

    Args:
        model: the model.
        request: the user's request, with a budget.
        sample: batch that the plan is for.
        smallest: decisions of the lowest peak, with a prediction.
        device: "cpu" or "cuda".
    """
    budget, plan = smallest.plan.budget_bytes, smallest.plan
    assert budget is not None and plan.prediction is not None
    kept, allowed = plan.prediction.phases["load"], largest_peak(budget, device, request.reserve)
    words = [f"a budget of {format_bytes(plan.peak_bytes)}"]
    if kept >= allowed:
        if any(p.dtype is torch.float32 for p in model.parameters()) and kept // 2 < allowed:
            words.append(f"model.bfloat16(), which keeps {format_bytes(kept // 2)} instead of {format_bytes(kept)}")
        return (*words, *_smaller_recipe(model, request, kept, allowed))
    asked = _settled(request, plan.recipe)
    share = (allowed - kept) / (plan.prediction.peak_bytes - kept)
    for dim, name in enumerate(("batch", "sequence length")):
        size = batch_size(sample, dim)
        for trial in range(_MAX_NUM_TRIALS):
            smaller = int(size * share * 0.6**trial)
            if smaller < 1:
                break
            simulator = StepSimulator(
                model,
                shortened(sample, dim, smaller),
                keep_logits=request.keep_logits,
                micro_batches=request.micro_batches,
                device=device,
            )
            try:
                found = PolicySearch(simulator.train(deciding(asked)), plan, device, request.reserve, ()).best()
            except ModelError:
                break  # the model does not accept the shortened sample
            if found.within_budget:
                words.append(f"{name} {smaller} instead of {size}")
                break
    return tuple(words)


def _smaller_recipe(model: nn.Module, request: Request, kept: int, allowed: int) -> list[str]:
    """Returns the recipe that keeps least, in words, if it leaves room for activations; no step is simulated."""
    if not isinstance(request.recipe, str) or request.recipe == SMALLEST:
        return []
    asked = dataclasses.replace(request, recipe=SMALLEST, overrides={**request.overrides, "update": "in-backward"})
    try:
        smaller = sum(decide(model, dataclasses.replace(asked, budget=None)).plan.kept.values())
    except SettingError:  # it conflicts with an override
        return []
    told = f"recipe={SMALLEST!r}, which keeps {format_bytes(smaller)} instead of {format_bytes(kept)}"
    return [told] if smaller < allowed else []


def _settled(request: Request, recipe: Recipe) -> Request:
    """Returns the request with the parts that the planner chose, so that nothing is chosen anew."""
    if not isinstance(request.recipe, str):
        return request
    open_parts = ("update", "rank", "refresh_limit") if recipe.projects else ("update",)
    settled = {**request.overrides, **{part: getattr(recipe, part) for part in open_parts}}
    return dataclasses.replace(request, recipe=recipe.name, overrides=settled)
