"""Chooses the settings that the user leaves open so that the predicted peak of a step fits a budget.

Candidates form levels of falling quality: full rank, then lower and lower rank. Within a level the results are equal:
the update is deferred to ``step()`` or happens in the backward, and an exact solver chooses the fastest activation
policy whose peak fits. The first level with a plan that fits gives its fastest one. If no plan of a level fits, its
refreshes are spread over more updates before the rank is lowered.
"""

import dataclasses
import itertools
from typing import Any

from torch import nn
from tqdm import tqdm

from galore_fx.assembly.decisions import Decisions, decide
from galore_fx.assembly.request import Request
from galore_fx.planner.activation_search import ACTIVATION_BUDGETS, PolicySearch, deciding
from galore_fx.planner.batch_guard import sample_shapes
from galore_fx.planner.suggestions import nearest_changes
from galore_fx.recipes.parts import parts_of
from galore_fx.recipes.recipe import Recipe
from galore_fx.simulation.fake_model import check_sample
from galore_fx.simulation.simulator import StepSimulator

RANKS = (0.25, 0.125, 0.0625)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One setting to be tried.

    Attributes:
        request: the user's request with some open parts filled in.
        words: what the candidate gives up, in words for the plan; empty if nothing.
    """

    request: Request
    words: tuple[str, ...]

    @property
    def title(self) -> str:
        """The words as one text; for a candidate that gives up nothing "full rank" or "as asked for"."""
        return " and ".join(self.words) or ("full rank" if self.request.recipe == "full" else "as asked for")


def decide_for_sample(model: nn.Module, request: Request) -> Decisions:
    """Returns the decisions for a model and the request's sample, with the predicted peak in the plan.

    Without a budget nothing is given up. If no candidate fits the budget, the plan is the simulated one of
    the lowest peak, and names the nearest changes that would fit.

    Raises:
        SettingError, ModelError, OptimizerError: as in ``galore_fx.plan``.
    """
    on_meta = isinstance(model, nn.Module) and next(model.parameters()).device.type == "meta"
    wanted = decide(model, request)
    if not on_meta:
        check_sample(model, request.sample)
    device = request.device or ("cuda" if on_meta else next(model.parameters()).device.type)
    simulator = StepSimulator(
        model, request.sample, keep_logits=request.keep_logits, micro_batches=request.micro_batches, device=device
    )
    sample = request.sample
    # The resolved instance is over the model's parameters and already checked.
    budget = wanted.plan.budget_bytes
    request = dataclasses.replace(request, budget=budget, sample=None, optimizer=wanted.optimizer)
    if wanted.plan.budget_bytes is None:
        search = PolicySearch(simulator.train(deciding(request)), wanted.plan, device, request.reserve, ())
        found = dataclasses.replace(wanted, plan=search.as_given())
    else:
        found = _first_that_fits(model, request, wanted, simulator, device)
    nearest = () if found.plan.within_budget else nearest_changes(model, request, sample, found, device)
    plan = dataclasses.replace(
        found.plan,
        nearest=nearest,
        batch={} if budget is None else sample_shapes(model, sample),
    )
    return dataclasses.replace(found, plan=plan)


def _first_that_fits(
    model: nn.Module, request: Request, wanted: Decisions, simulator: StepSimulator, device: str
) -> Decisions:
    """Returns the fastest fitting plan of the first level that has one; if none fits, the plan of the lowest peak."""
    too_large: list[Decisions] = []
    rejected: list[tuple[str, int]] = []
    levels = _levels(wanted, request)
    with tqdm(levels, desc="planning", unit="level", disable=None, leave=False, delay=2) as progress:
        for level in progress:
            fitting: list[Decisions] = []
            searched: list[tuple[Decisions, PolicySearch]] = []
            for candidate in level:
                chosen = decide(model, candidate.request)
                is_last = candidate is levels[-1][-1]
                if chosen.plan.fits is False and (fitting or not is_last or too_large):
                    rejected.append((candidate.title, sum(chosen.plan.kept.values())))
                    continue  # exceeds the budget before any activation
                training = simulator.train(deciding(candidate.request))
                search = PolicySearch(training, chosen.plan, device, request.reserve, candidate.words)
                plan = search.best() if _is_open(request, "activation_budget") else search.as_given()
                found = dataclasses.replace(chosen, plan=plan)
                if not plan.within_budget:
                    rejected.append((candidate.title, plan.peak_bytes))
                    too_large.append(found)
                    searched.append((chosen, search))
                    continue
                fitting.append(found)
                if plan.activation_policy == chosen.plan.activation_policy:
                    break  # nothing more is recomputed; no later candidate is faster
            if not fitting and _is_open(request, "refresh_limit"):
                for limited in itertools.chain.from_iterable(_refreshing_in_turns(*each, request) for each in searched):
                    (fitting if limited.plan.within_budget else too_large).append(limited)
            if fitting:
                fastest = min(fitting, key=lambda each: each.plan.seconds)  # of equals the first, which gives up less
                return dataclasses.replace(fastest, plan=dataclasses.replace(fastest.plan, rejected=tuple(rejected)))
    return min(too_large, key=lambda each: each.plan.peak_bytes)  # the last is always searched if no other was


def _is_open(request: Request, part: str) -> bool:
    """Whether the planner may choose a part; a ``Recipe`` object of the user's sets all of them."""
    return isinstance(request.recipe, str) and part not in request.overrides


def _refreshing_in_turns(chosen: Decisions, search: PolicySearch, request: Request) -> list[Decisions]:
    recipe = chosen.recipe
    if not recipe.projects or recipe.iterations > 1 or recipe.merge_factors:
        return []
    shares = ACTIVATION_BUDGETS if _is_open(request, "activation_budget") else chosen.plan.activation_policy[:1]
    plan = search.best_of_limited(shares)
    return [] if plan is None else [dataclasses.replace(chosen, plan=plan, recipe=plan.recipe)]


def _levels(wanted: Decisions, request: Request) -> list[list[Candidate]]:
    """Returns candidates for the parts that the user left open, in levels of falling quality, equal within a level."""
    recipe, given = wanted.recipe, request.overrides
    is_named = isinstance(request.recipe, str)
    wants_projection = any(part.of_projection for name, part in parts_of(Recipe).items() if name in given)
    levels = [Candidate(request, ())]
    if is_named and recipe.name == "auto" and "rank" not in given:
        levels = [] if wants_projection else [Candidate(dataclasses.replace(request, recipe="full"), ())]
        levels += [
            Candidate(_with(request, rank=rank), (f"weights train in subspaces of {rank:g} of their shorter side",))
            for rank in RANKS
        ]
    update_is_open = (
        is_named
        and "update" not in given
        and request.micro_batches == 1
        and recipe.update == "deferred"
        and recipe.max_grad_norm is None
    )
    return [[level, _in_backward(level)] if update_is_open else [level] for level in levels]


def _in_backward(candidate: Candidate) -> Candidate:
    words = (*candidate.words, "update='in-backward': no accumulation over micro-batches, no clipping")
    return Candidate(_with(candidate.request, update="in-backward"), words)


def _with(request: Request, **parts: Any) -> Request:
    return dataclasses.replace(request, overrides={**request.overrides, **parts})
