"""Chooses what the recipe leaves open, so that the predicted peak of a step fits a budget.

Candidates stand in the order of what they give up: nothing; time (recomputation, more of it); the gradients that
outlive the backward (no accumulation, no clipping); rank. Each is simulated and the first that fits is taken. The peak
is not monotone in the share of activations that is kept, so none is left out because a milder one did not fit.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import nn
from tqdm import tqdm

from galore_fx.decisions import Decisions, decide
from galore_fx.errors import SettingError
from galore_fx.optimizer_choice import OptimizerChoice, for_a_copy
from galore_fx.plan_record import Plan
from galore_fx.recipe import Recipe
from galore_fx.simulation import StepSimulator

ACTIVATION_BUDGETS = (0.5, 0.2, 0.0)
RANK_FACTORS = (1.0, 0.5, 0.25)
# On CUDA, until a GPU has verified the simulation: context and libraries, and a share for fragmentation and workspaces.
CUDA_CONTEXT_BYTES = 600 * 2**20
CUDA_MARGIN = 0.1


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Settings that are tried, over those that the user gave.

    Attributes:
        overrides: parts of the recipe.
        words: what they mean, for the plan; empty where nothing is given up.
    """

    overrides: dict[str, Any]
    words: tuple[str, ...]


def decide_for_sample(
    model: nn.Module,
    budget: str | int | None,
    sample: object,
    recipe: str | Recipe,
    optimizer: OptimizerChoice,
    overrides: dict[str, Any],
    *,
    keep_logits: bool,
    micro_batches: int = 1,
    device: str | None = None,
) -> Decisions:
    """The decisions for a model and a batch, with the predicted peak in the plan.

    Arguments and errors are those of ``galore_fx.plan``. Without a budget nothing is given up; where nothing that may
    be chosen fits it, the plan is the smallest and says that it does not fit.
    """
    on_meta = next(model.parameters()).device.type == "meta" if isinstance(model, nn.Module) else False
    wanted = decide(model, budget, None if on_meta else sample, recipe, optimizer, overrides)
    given = overrides if isinstance(recipe, str) else dataclasses.asdict(wanted.recipe)  # a Recipe is meant as it is
    if micro_batches > 1:
        if wanted.recipe.update == "in-backward":
            raise SettingError(f"micro_batches={micro_batches} accumulate gradients, which update='in-backward' cannot")
        given = {**given, "update": "deferred"}
    candidates = list(_candidates(wanted, given)) if wanted.plan.budget_bytes is not None else [Candidate({}, ())]
    device = device or ("cuda" if on_meta else next(model.parameters()).device.type)
    simulator = StepSimulator(
        model, sample, keep_logits=keep_logits, micro_batches=micro_batches, measure_kernels=device == "cpu"
    )
    smallest: Plan | None = None
    with tqdm(candidates, desc="planning", unit="plan", disable=None, leave=False, delay=2) as progress:
        for candidate in progress:
            settings = {**overrides, **candidate.overrides}
            chosen = wanted
            if candidate.overrides:
                chosen = decide(model, budget, None, recipe, wanted.optimizer, settings)
            if chosen.plan.fits is False and candidate is not candidates[-1]:
                continue  # what is kept exceeds the budget before any activation
            prediction = simulator.predict(
                lambda fake, variants, settings=settings: decide(  # type: ignore[misc]
                    fake, None, None, recipe, for_a_copy(wanted.optimizer), settings, variants=variants
                )
            )
            estimated = device != "cpu"
            reserve = int(CUDA_CONTEXT_BYTES + CUDA_MARGIN * prediction.peak_bytes) if estimated else 0
            plan = dataclasses.replace(
                chosen.plan,
                prediction=prediction,
                estimated=estimated,
                reserve_bytes=reserve,
                chosen=candidate.words,
            )
            if plan.within_budget:
                return dataclasses.replace(chosen, plan=plan)
            if smallest is None or plan.peak_bytes < smallest.peak_bytes:
                smallest = plan
    assert smallest is not None, "there is always a candidate"
    return dataclasses.replace(wanted, plan=smallest)


def _candidates(wanted: Decisions, overrides: dict[str, Any]) -> Iterator[Candidate]:
    recipe = wanted.recipe
    rank_is_open = "rank" not in overrides and recipe.projects and recipe.name == "auto"
    update_is_open = "update" not in overrides and recipe.update == "deferred" and recipe.max_grad_norm is None
    lower = () if "activation_budget" in overrides else ACTIVATION_BUDGETS
    budgets = (recipe.activation_budget, *(share for share in lower if share < recipe.activation_budget))
    for factor in RANK_FACTORS if rank_is_open else (1.0,):
        for update in (recipe.update, "in-backward") if update_is_open else (recipe.update,):
            for share in budgets:
                changed: dict[str, Any] = {}
                words = []
                if share != recipe.activation_budget:
                    changed["activation_budget"] = share
                    words.append(f"activation_budget={share}: what is not kept is recomputed")
                if update != recipe.update:
                    changed["update"] = update
                    words.append("update='in-backward': no accumulation over micro-batches, no clipping")
                if factor != 1.0:
                    changed["rank"] = _scaled_rank(recipe.rank, factor)
                    words.append(f"rank={changed['rank']} instead of {recipe.rank}")
                yield Candidate(changed, tuple(words))


def _scaled_rank(rank: int | float, factor: float) -> int | float:
    return rank * factor if isinstance(rank, float) else max(1, int(rank * factor))
