"""Chooses what the recipe leaves open, so that the predicted peak of a step fits a budget.

Settings stand in the order of what they give up: nothing; the gradients that outlive the backward (no accumulation, no
clipping); the full rank, and then rank. Under each of them the activation policy is chosen by an exact solver: the
fastest for which every moment of the step fits.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from galore_fx.decisions import Decisions, decide
from galore_fx.errors import SettingError
from galore_fx.optimizer_choice import for_a_copy
from galore_fx.passes.memory_plan.activation_policy import Choice, fastest_within, least_peak
from galore_fx.passes.memory_plan.step_model import StepModel
from galore_fx.plan_record import Plan
from galore_fx.request import Request
from galore_fx.simulation import Decide, FakeTraining, StepSimulator

ACTIVATION_BUDGETS = (1.0, 0.5, 0.2, 0.0)
RANKS = (0.25, 0.125, 0.0625)
# On CUDA, until a GPU has verified the simulation: context and libraries, and a share for fragmentation and workspaces.
CUDA_CONTEXT_BYTES = 600 * 2**20
CUDA_MARGIN = 0.1
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
    # An instance of the user's is over the model's parameters and already checked.
    request = dataclasses.replace(request, sample=None, optimizer=wanted.optimizer)
    if wanted.plan.budget_bytes is None:
        search = _PolicySearch(simulator.train(_deciding(request)), wanted.plan, device, ())
        return dataclasses.replace(wanted, plan=search.as_given())
    smallest: Decisions | None = None
    candidates = list(_candidates(wanted, request))
    with tqdm(candidates, desc="planning", unit="plan", disable=None, leave=False, delay=2) as progress:
        for candidate in progress:
            chosen = decide(model, candidate.request)
            if chosen.plan.fits is False and candidate is not candidates[-1]:
                continue  # what is kept exceeds the budget before any activation
            share_is_open = "activation_budget" not in request.overrides and isinstance(request.recipe, str)
            search = _PolicySearch(simulator.train(_deciding(candidate.request)), chosen.plan, device, candidate.words)
            plan = search.best() if share_is_open else search.as_given()
            if smallest is None or plan.within_budget or plan.peak_bytes < smallest.plan.peak_bytes:
                smallest = dataclasses.replace(chosen, plan=plan)
            if plan.within_budget:
                break
    assert smallest is not None, "there is always a candidate"
    return smallest


def _deciding(request: Request) -> Decide:
    """What decides the same about a copy of the model."""
    assert isinstance(request.optimizer, Optimizer)
    for_copies = dataclasses.replace(request, budget=None, optimizer=for_a_copy(request.optimizer))
    return lambda fake, variants: decide(fake, for_copies, variants)


class _PolicySearch:
    """The activation policy of one candidate."""

    def __init__(self, training: FakeTraining, plan: Plan, device: str, words: tuple[str, ...]) -> None:
        self._training, self._plan, self._device, self._words = training, plan, device, words

    def as_given(self) -> Plan:
        """The plan with the policy that it has."""
        share = self._plan.activation_policy[0]
        return self._predicted(self._training.model([share]), (0,) * len(self._plan.regions))

    def best(self) -> Plan:
        """The fastest policy that fits, else the one of the lowest peak."""
        kept = self.as_given()
        if kept.within_budget:
            return kept
        model = self._training.model(ACTIVATION_BUDGETS)
        problem = model.problem()
        assert self._plan.budget_bytes is not None
        choice = fastest_within(problem, _largest_peak(self._plan.budget_bytes, self._device))
        return self._predicted(model, least_peak(problem) if choice is None else choice)

    def _predicted(self, model: StepModel, choice: Choice) -> Plan:
        prediction = model.prediction(choice, self._training.uncaptured)
        policy = tuple(model.shares[option] for option in choice)
        words = self._words
        if policy != self._plan.activation_policy:
            counts = {share: policy.count(share) for share in sorted(set(policy), reverse=True)}
            told = ", ".join(f"{number} blocks keep {share:g}" for share, number in counts.items())
            words = (*words, f"activations are recomputed: of what they save, {told}")
        return dataclasses.replace(
            self._plan,
            activation_policy=policy,
            chosen=words,
            prediction=prediction,
            estimated=self._device != "cpu",
            reserve_bytes=_reserve(prediction.peak_bytes, self._device),
        )


def _reserve(peak_bytes: int, device: str) -> int:
    return int(CUDA_CONTEXT_BYTES + CUDA_MARGIN * peak_bytes) if device != "cpu" else 0


def _largest_peak(budget_bytes: int, device: str) -> int:
    """The highest peak that leaves room for its reserve."""
    return budget_bytes if device == "cpu" else int((budget_bytes - CUDA_CONTEXT_BYTES) / (1 + CUDA_MARGIN))


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
