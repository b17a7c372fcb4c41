"""Searches the activation policy of one candidate, all other settings being fixed, from simulated steps."""

import dataclasses
from collections.abc import Sequence

from torch.optim import Optimizer

from galore_fx.assembly.decisions import decide
from galore_fx.assembly.request import Request
from galore_fx.assembly.user_optimizer import for_a_copy
from galore_fx.passes.memory_plan.activation_policy import Choice, fastest_within, least_peak
from galore_fx.passes.memory_plan.step_model import StepModel
from galore_fx.plan_record import Plan
from galore_fx.simulation.simulator import Decide, Training
from galore_fx.units import parse_bytes

ACTIVATION_BUDGETS = (1.0, 0.5, 0.2, 0.0)
# Reserve on CUDA, whose simulation no GPU has verified: context, libraries, workspaces; a fraction for fragmentation.
CUDA_CONTEXT_BYTES = 600 * 2**20
CUDA_MARGIN = 0.1
# Keeping least gives nearly the lowest peak. If it exceeds the budget by this factor, the candidate is given up.
HOPELESS = 1.1


class PolicySearch:
    """Searches the activation policy of one candidate.

    Args:
        training: simulated training of the candidate.
        plan: plan of the candidate; a prediction in it is replaced.
        device: "cpu" or "cuda".
        reserve: as in ``galore_fx.compile``.
        words: what the candidate gives up, in words.
    """

    def __init__(
        self, training: Training, plan: Plan, device: str, reserve: str | int | None, words: tuple[str, ...]
    ) -> None:
        self._training, self._plan, self._device, self._words = training, plan, device, words
        self._reserve = reserve

    def as_given(self) -> Plan:
        """Returns the plan with its own policy and the prediction for it."""
        policy = self._plan.activation_policy
        shares = sorted(set(policy), reverse=True)
        return self._predicted(self._training.model(shares), tuple(map(shares.index, policy)))

    def best(self) -> Plan:
        """Returns the plan of the fastest policy that fits, else of the lowest peak.

        Far above the budget it is the plan that keeps the least activations, whose peak is near the lowest.
        """
        if self._keeps_too_much:  # predicts only the excess
            return self._predicted(self._training.model(ACTIVATION_BUDGETS[-1:]), (0,) * len(self._plan.regions))
        kept = self.as_given()
        if kept.within_budget:
            return kept
        sparing = self._predicted(self._training.model(ACTIVATION_BUDGETS[-1:]), (0,) * len(self._plan.regions))
        assert sparing.budget_bytes is not None
        if sparing.peak_bytes > HOPELESS * sparing.budget_bytes:
            return sparing
        model = self._training.model(ACTIVATION_BUDGETS)
        problem = model.problem()
        assert self._plan.budget_bytes is not None
        choice = fastest_within(problem, largest_peak(self._plan.budget_bytes, self._device, self._reserve))
        return self._predicted(model, least_peak(problem) if choice is None else choice)

    def best_of_limited(self, shares: Sequence[float]) -> Plan | None:
        """Limits the refreshes of one update to the largest number that fits, with the fastest policy that fits.

        Args:
            shares: shares of its activations (0 to 1) that a block may keep, in falling order.

        Returns:
            The plan. If nothing fits, it has the lowest limit and the policy of the lowest peak, or keeps least where
            the budget is exceeded before any activation. None if no lower limit lets each basis refresh within the gap.
        """
        assert self._plan.budget_bytes is not None
        limits = _refresh_limits(len(self._plan.regions), self._plan.recipe.refresh_gap)
        if self._keeps_too_much and limits:  # predicts only the excess
            model = self._training.model(shares[-1:], limits[-1])
            return self._predicted(model, (0,) * len(self._plan.regions), limits[-1])
        for limit in limits:
            model = self._training.model(shares, limit)
            problem = model.problem()
            choice = fastest_within(problem, largest_peak(self._plan.budget_bytes, self._device, self._reserve))
            if choice is not None or limit == limits[-1]:
                return self._predicted(model, least_peak(problem) if choice is None else choice, limit)
        return None

    @property
    def _keeps_too_much(self) -> bool:
        """Whether the bytes kept through the whole step already exceed the budget."""
        return sum(self._plan.kept.values()) > (self._plan.budget_bytes or 0)

    def _predicted(self, model: StepModel, choice: Choice, refresh_limit: int | None = None) -> Plan:
        prediction = model.prediction(choice, self._training.uncaptured)
        policy = tuple(model.shares[option] for option in choice)
        words, recipe = self._words, self._plan.recipe
        if refresh_limit is not None:
            recipe = dataclasses.replace(recipe, refresh_limit=refresh_limit)
            words = (*words, f"at most {refresh_limit} blocks renew their bases in the same update")
        if policy != self._plan.activation_policy:
            counts = {share: policy.count(share) for share in sorted(set(policy), reverse=True)}
            told = ", ".join(f"{number} blocks keep {share:g}" for share, number in counts.items())
            words = (*words, f"activations are recomputed: of what they save, {told}")
        return dataclasses.replace(
            self._plan,
            recipe=recipe,
            activation_policy=policy,
            chosen=words,
            prediction=prediction,
            estimated=self._device != "cpu",
            device=self._device,
            reserve_bytes=_reserve_bytes(prediction.peak_bytes, self._device, self._reserve),
        )


def _refresh_limits(num_blocks: int, gap: int) -> list[int]:
    """Returns successive halves of the number of blocks, down to the least that refreshes each basis once per gap."""
    least = -(-num_blocks // gap)
    halves = [num_blocks // 2**power for power in range(1, num_blocks.bit_length())]
    return [limit for limit in halves if limit > least] + ([least] if least < num_blocks else [])


def _reserve_bytes(peak_bytes: int, device: str, reserve: str | int | None) -> int:
    if reserve is not None:
        return parse_bytes(reserve, "reserve") if reserve else 0
    return int(CUDA_CONTEXT_BYTES + CUDA_MARGIN * peak_bytes) if device != "cpu" else 0


def largest_peak(budget_bytes: int, device: str, reserve: str | int | None) -> int:
    """Returns the highest peak, in bytes, that leaves room for the reserve within the budget."""
    if reserve is not None or device == "cpu":
        return budget_bytes - _reserve_bytes(0, device, reserve)
    return int((budget_bytes - CUDA_CONTEXT_BYTES) / (1 + CUDA_MARGIN))


def deciding(request: Request) -> Decide:
    """Returns a function that makes the same decisions for a copy of the model, without a budget."""
    assert isinstance(request.optimizer, Optimizer)
    for_copies = dataclasses.replace(request, budget=None, optimizer=for_a_copy(request.optimizer))
    return lambda fake, variants: decide(fake, for_copies, variants)
