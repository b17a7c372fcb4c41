"""Chooses what the recipe leaves open, so that the predicted peak of a step fits a budget.

Settings stand in the order of what they give up: nothing; the gradients that outlive the backward (no accumulation, no
clipping); the full rank, and then rank. Under each of them the activation policy is chosen by an exact solver: the
fastest for which every moment of the step fits.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import nn
from tqdm import tqdm

from galore_fx.decisions import Decisions, decide
from galore_fx.errors import SettingError
from galore_fx.nearest_changes import nearest_changes
from galore_fx.policy_search import PolicySearch, deciding
from galore_fx.request import Request
from galore_fx.simulation import StepSimulator

RANKS = (0.25, 0.125, 0.0625)
# Parts that mean something only where weights are projected: who sets one wants projection.
_OF_PROJECTION = ("rank", "project", "basis", "refresh", "refresh_gap", "stagger", "scale")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Settings that are tried.

    Attributes:
        request: what the user asked, with some of what is left open filled in.
        words: what that means, for the plan; empty where nothing is given up.
    """

    request: Request
    words: tuple[str, ...]

    @property
    def title(self) -> str:
        """The words as one; for a candidate that gives up nothing, what that means."""
        return " and ".join(self.words) or ("full rank" if self.request.recipe == "full" else "as asked for")


def decide_for_sample(model: nn.Module, request: Request) -> Decisions:
    """The decisions for a model and a batch, with the predicted peak in the plan.

    Errors are those of ``galore_fx.plan``. Without a budget nothing is given up; where nothing that may be chosen fits
    it, the plan is the smallest and says that it does not fit.
    """
    on_meta = isinstance(model, nn.Module) and next(model.parameters()).device.type == "meta"
    wanted = decide(model, dataclasses.replace(request, sample=None) if on_meta else request)
    if request.micro_batches > 1 and wanted.recipe.update == "in-backward":
        raise SettingError(
            f"micro_batches={request.micro_batches} accumulate gradients, which update='in-backward' cannot"
        )
    device = request.device or ("cuda" if on_meta else next(model.parameters()).device.type)
    simulator = StepSimulator(
        model, request.sample, keep_logits=request.keep_logits, micro_batches=request.micro_batches, device=device
    )
    sample = request.sample
    # An instance of the user's is over the model's parameters and already checked.
    request = dataclasses.replace(request, sample=None, optimizer=wanted.optimizer)
    if wanted.plan.budget_bytes is None:
        search = PolicySearch(simulator.train(deciding(request)), wanted.plan, device, ())
        return dataclasses.replace(wanted, plan=search.as_given())
    found = _first_that_fits(model, request, wanted, simulator, device)
    if not found.plan.within_budget:
        nearest = nearest_changes(model, request, sample, found, device)
        found = dataclasses.replace(found, plan=dataclasses.replace(found.plan, nearest=nearest))
    return found


def _first_that_fits(
    model: nn.Module, request: Request, wanted: Decisions, simulator: StepSimulator, device: str
) -> Decisions:
    """The first candidate that fits; the smallest where none does."""
    smallest: Decisions | None = None
    rejected: list[tuple[str, int]] = []
    candidates = list(_candidates(wanted, request))
    with tqdm(candidates, desc="planning", unit="plan", disable=None, leave=False, delay=2) as progress:
        for candidate in progress:
            chosen = decide(model, candidate.request)
            if chosen.plan.fits is False and candidate is not candidates[-1]:
                rejected.append((candidate.title, sum(chosen.plan.kept.values())))
                continue  # what is kept exceeds the budget before any activation
            share_is_open = "activation_budget" not in request.overrides and isinstance(request.recipe, str)
            search = PolicySearch(simulator.train(deciding(candidate.request)), chosen.plan, device, candidate.words)
            plan = search.best() if share_is_open else search.as_given()
            if plan.within_budget:
                return dataclasses.replace(chosen, plan=dataclasses.replace(plan, rejected=tuple(rejected)))
            rejected.append((candidate.title, plan.peak_bytes))
            if smallest is None or plan.peak_bytes < smallest.plan.peak_bytes:
                smallest = dataclasses.replace(chosen, plan=plan)
    assert smallest is not None, "there is always a candidate"
    return smallest


def _candidates(wanted: Decisions, request: Request) -> Iterator[Candidate]:
    """Settings in the order of what they give up, of those parts that the user has left open."""
    recipe, given = wanted.recipe, request.overrides
    is_named = isinstance(request.recipe, str)
    wants_projection = any(part in given for part in _OF_PROJECTION)
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
    for level in levels:
        yield level
        if update_is_open:
            words = (*level.words, "update='in-backward': no accumulation over micro-batches, no clipping")
            yield Candidate(_with(level.request, update="in-backward"), words)


def _with(request: Request, **parts: Any) -> Request:
    return dataclasses.replace(request, overrides={**request.overrides, **parts})
