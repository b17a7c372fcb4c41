"""What one policy's simulated steps were, and what follows from them: a prediction, and the solver's problem."""

import dataclasses
from collections.abc import Mapping, Sequence

from galore_fx.passes.memory_plan.activation_policy import MomentBytes, PolicyProblem
from galore_fx.passes.memory_plan.block_calls import Call, scenes
from galore_fx.passes.memory_plan.storage_counter import Moment
from galore_fx.plan_record import Prediction


@dataclasses.dataclass(frozen=True)
class Window:
    """One simulated step.

    Attributes:
        moments: bytes that the step has made and not freed, after each event.
        calls: the blocks' calls.
        saved: bytes that each call's forward left behind.
        block_seconds: time of each call's forward and backward.
        phase_seconds: time of each phase.
    """

    moments: list[Moment]
    calls: list[Call]
    saved: list[int]
    block_seconds: list[float]
    phase_seconds: dict[str, float]


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """The steps that were played under one activation policy.

    Attributes:
        persistent: bytes that live through the whole step, by category.
        steady, refreshing: steps without and with a refresh of all bases.
        evaluation: moments of a forward without gradients.
        uncaptured: blocks that run uncompiled.
    """

    persistent: dict[str, int]
    steady: Window
    refreshing: Window
    evaluation: list[Moment]
    uncaptured: tuple[str, ...]

    def prediction(self) -> Prediction:
        """Peak, phases and categories."""
        kept = sum(self.persistent.values())
        phases = {"load": kept}
        peak, categories = kept, dict(self.persistent)
        windows = (("", self.steady.moments), ("refreshing ", self.refreshing.moments), ("", self.evaluation))
        for prefix, moments in windows:
            for moment in moments:
                name = moment.phase if moment.phase in ("refresh", "eval") else prefix + moment.phase
                phases[name] = max(phases.get(name, 0), kept + moment.total)
                if kept + moment.total > peak:
                    peak, categories = kept + moment.total, _added(self.persistent, moment.categories)
        phases["save"] = kept
        timeline = tuple((m.phase, _added(self.persistent, m.categories)) for m in self.steady.moments)
        return Prediction(peak, phases, categories, timeline, self.uncaptured, dict(self.steady.phase_seconds))


def policy_problem(records: Sequence[StepRecord], num_blocks: int) -> PolicyProblem:
    """The choice of an activation budget for each block, from steps in which all blocks had the same.

    Args:
        records: one per alternative.
        num_blocks: how many blocks the model has.
    """
    saved = [[0] * len(records) for _ in range(num_blocks)]
    seconds = [[0.0] * len(records) for _ in range(num_blocks)]
    highest: dict[tuple[tuple[int, ...], int | None], list[int]] = {}
    for option, record in enumerate(records):
        kept = sum(record.persistent.values())
        for call, spent in zip(record.steady.calls, record.steady.block_seconds, strict=True):
            seconds[call.block][option] += spent
        for window in (record.steady, record.refreshing):
            for call, num_bytes in zip(window.calls, window.saved, strict=True):
                saved[call.block][option] = max(saved[call.block][option], num_bytes)
        for window in (record.steady, record.refreshing):
            for moment, scene in scenes(window.calls, window.moments):
                blocks = tuple(window.calls[i].block for i in scene.saving)
                row = highest.setdefault((blocks, _block(window.calls, scene.running)), [0] * len(records))
                row[option] = max(row[option], kept + moment.total - sum(saved[block][option] for block in blocks))
        row = highest.setdefault(((), None), [0] * len(records))
        row[option] = max([row[option], *(kept + moment.total for moment in record.evaluation)])
    moments = tuple(
        MomentBytes(saving, running, tuple(row) if running is not None else (max(row),))
        for (saving, running), row in highest.items()
    )
    return PolicyProblem(tuple(map(tuple, saved)), tuple(map(tuple, seconds)), moments)


def _block(calls: Sequence[Call], running: int | None) -> int | None:
    return None if running is None else calls[running].block


def _added(persistent: Mapping[str, int], categories: Mapping[str, int]) -> dict[str, int]:
    return {key: persistent.get(key, 0) + categories.get(key, 0) for key in {**persistent, **categories}}
