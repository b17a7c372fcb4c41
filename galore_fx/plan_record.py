"""Defines the plan as data, without torch: the treatment of each parameter and the resulting bytes.

With a sample the plan holds the prediction of a simulated step. Without one it sums the bytes kept through the step
and states that activations, the loss and temporary workspaces are not counted.
"""

import dataclasses
import json

from tabulate import tabulate

from galore_fx.errors import SettingError
from galore_fx.recipes.recipe import Recipe
from galore_fx.units import format_bytes

CATEGORIES = ("weights", "factors", "bases", "optimizer_state", "residuals", "gradients")
NOT_COUNTED = ("activations", "loss", "workspace", "reserve")


@dataclasses.dataclass(frozen=True)
class ParameterPlan:
    """The plan of one parameter.

    Attributes:
        name: qualified name in the model.
        shape: shape of the parameter.
        region: index of the region it refreshes with; None at full rank.
        dim: "rows" or "cols", the projected dimension; None at full rank.
        rank: the rank in force; None at full rank.
        bytes: bytes by category (``CATEGORIES``).
        reason: why it is projected or not: its role in the model, or a recipe that projects nothing.
        shared_with: its other names, if several modules use it.
        weight_bits: bits of a stored code; None if it is stored in its own dtype.
    """

    name: str
    shape: tuple[int, ...]
    region: int | None
    dim: str | None
    rank: int | None
    bytes: dict[str, int]
    reason: str = ""
    shared_with: tuple[str, ...] = ()
    weight_bits: int | None = None


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The predicted memory and time of a training step, from a simulation.

    Attributes:
        peak_bytes: most bytes alive at once, in a steady step, a refreshing step or evaluation.
        phases: most bytes alive in each phase: load; forward, backward and update of a steady step, and of a refreshing
            one; refresh, eval, save.
        categories: bytes at the peak by category.
        timeline: (phase, bytes by category) through a steady step, block by block; each entry is the peak of one event.
        uncaptured: names of the blocks that run uncompiled.
        seconds: time of each phase of a steady step by a roofline model; only for comparing plans.
        kept: bytes by category that live through the whole step.
    """

    peak_bytes: int
    phases: dict[str, int]
    categories: dict[str, int]
    timeline: tuple[tuple[str, dict[str, int]], ...]
    uncaptured: tuple[str, ...]
    seconds: dict[str, float]
    kept: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The memory plan of a compiled model: all decisions and the resulting bytes.

    Attributes:
        recipe: the recipe in force.
        optimizer: name of the optimizer class.
        budget_bytes: the budget; None without one.
        regions: names of the modules, each of which is compiled as one graph.
        parameters: one entry per trained parameter.
        fixed_bytes: bytes of frozen parameters and buffers.
        activation_policy: the share of its activations that each region keeps for the backward, 0 to 1.
        prediction: prediction from a simulated step; None without a sample.
        estimated: whether the prediction is for a device on which predictions have not been verified.
        reserve_bytes: bytes kept free for memory that the simulation does not cover.
        chosen: settings chosen by the planner to meet the budget, in words.
        rejected: settings that give up less, in words, each with the least bytes it needs.
        nearest: if nothing fits, changes that would make it fit, in words.
        keep_logits: as in ``compile``.
        micro_batches: as in ``compile``.
        batch: shapes of the sample's tensors by argument, which no training call may exceed; empty for no limit.
        device: device of the prediction, "cpu" or "cuda"; None without a prediction.
    """

    recipe: Recipe
    optimizer: str
    budget_bytes: int | None
    regions: tuple[str, ...]
    parameters: tuple[ParameterPlan, ...]
    fixed_bytes: int
    activation_policy: tuple[float, ...]
    prediction: Prediction | None = None
    estimated: bool = False
    reserve_bytes: int = 0
    chosen: tuple[str, ...] = ()
    rejected: tuple[tuple[str, int], ...] = ()
    nearest: tuple[str, ...] = ()
    keep_logits: bool = False
    micro_batches: int = 1
    batch: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    device: str | None = None

    @property
    def categories(self) -> dict[str, int]:
        """Bytes by category at the predicted peak, with the reserve; without a prediction, those kept in a step."""
        if self.prediction is None:
            return self.kept
        return {**self.prediction.categories, "reserve": self.reserve_bytes}

    @property
    def phases(self) -> dict[str, int]:
        """Predicted peak of each phase, without the reserve; empty without a prediction."""
        return {} if self.prediction is None else dict(self.prediction.phases)

    @property
    def kept(self) -> dict[str, int]:
        """Bytes by category kept through the step; of the gradients, as many as the update mode holds at once."""
        sizes = {name: sum(p.bytes[name] for p in self.parameters) for name in CATEGORIES}
        sizes["weights"] += self.fixed_bytes
        if self.recipe.update == "in-backward":
            by_region: dict[object, int] = {}
            for p in self.parameters:
                key = p.name if p.region is None else p.region
                by_region[key] = by_region.get(key, 0) + p.bytes["gradients"]
            sizes["gradients"] = max(by_region.values(), default=0)
        return sizes

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of a whole step, reserve included; without a prediction, a lower bound of the peak."""
        return sum(self.categories.values())

    @property
    def is_without_batch(self) -> bool:
        """Whether there is a budget, but no batch has been simulated for it."""
        return self.budget_bytes is not None and self.prediction is None

    @property
    def seconds(self) -> float:
        """Predicted time of a steady step with at most two micro-batches, to compare plans; 0 without a prediction."""
        return 0.0 if self.prediction is None else sum(self.prediction.seconds.values())

    @property
    def within_budget(self) -> bool:
        """Whether ``peak_bytes``, even as an estimate or a lower bound, is within the budget; True without a budget."""
        return self.budget_bytes is None or self.peak_bytes <= self.budget_bytes

    @property
    def fits(self) -> bool | None:
        """Whether the step fits the budget; None if unknown: without budget or sample, or from an estimate alone.

        False is certain as soon as the bytes kept through the step exceed the budget.
        """
        if self.budget_bytes is None:
            return None
        if sum(self.kept.values()) > self.budget_bytes:
            return False
        return None if self.prediction is None or self.estimated else self.within_budget

    def table(self) -> str:
        """Returns the plan as text: bytes by category and phase, and the categories that are not counted."""
        rows = [(name, format_bytes(size)) for name, size in self.categories.items() if size or self.prediction is None]
        if self.prediction is None:
            rows += [(name, "not counted") for name in NOT_COUNTED]
            rows.append(("kept through the step", format_bytes(self.peak_bytes)))
        else:
            kind = "estimated" if self.estimated else "predicted"
            rows.append((f"{kind} peak", format_bytes(self.peak_bytes)))
        if self.budget_bytes is not None:
            rows.append(("budget", format_bytes(self.budget_bytes)))
            if self.prediction is not None and self.within_budget:
                rows.append(("headroom", format_bytes(self.budget_bytes - self.peak_bytes)))
        num_projected = sum(p.rank is not None for p in self.parameters)
        title = (
            f"recipe {self.recipe.name}, {self.optimizer}, {self.recipe.update} update: "
            f"{num_projected} of {len(self.parameters)} parameters projected"
        )
        parts = [title, *(f"chosen for the budget: {choice}" for choice in self.chosen)]
        parts += [f"not {words}: needs {format_bytes(size)}" for words, size in self.rejected]
        parts.append(tabulate(rows, headers=("category", "bytes"), colalign=("left", "right")))
        if self.prediction is not None:
            phases = [(name, format_bytes(size)) for name, size in self.phases.items()]
            parts += ["", tabulate(phases, headers=("phase", "peak"), colalign=("left", "right"))]
            whole = sum(self.prediction.seconds.values())
            shares = ", ".join(f"{name} {size / whole:.0%}" for name, size in self.prediction.seconds.items())
            parts += ["", f"time of a steady step, by a roofline: {shares}"]
        return "\n".join(parts)

    def to_json(self) -> str:
        """Returns the plan and the figures derived from it as JSON text."""
        figures = {
            "peak_bytes": self.peak_bytes,
            "peak_is": "lower bound" if self.prediction is None else "estimate" if self.estimated else "prediction",
            "budget_bytes": self.budget_bytes,
            "fits": self.fits,
            "categories": self.categories,
            "phases": self.phases,
            "not_counted": () if self.prediction else NOT_COUNTED,
        }
        return json.dumps({**figures, **dataclasses.asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Reads a plan from the text that ``to_json`` wrote; derived figures are computed anew.

        Raises:
            SettingError: the text is not such a plan.
        """
        try:
            data = json.loads(text)
            if len(data["activation_policy"]) != len(data["regions"]):
                raise ValueError(
                    f"{len(data['activation_policy'])} shares of activations, {len(data['regions'])} blocks"
                )
            parameters = tuple(
                ParameterPlan(**{**entry, "shape": tuple(entry["shape"]), "shared_with": tuple(entry["shared_with"])})
                for entry in data["parameters"]
            )
            prediction = data["prediction"]
            if prediction is not None:
                timeline = tuple((phase, categories) for phase, categories in prediction["timeline"])
                prediction = Prediction(
                    **{**prediction, "timeline": timeline, "uncaptured": tuple(prediction["uncaptured"])}
                )
            return cls(
                Recipe(**data["recipe"]),
                data["optimizer"],
                data["budget_bytes"],
                tuple(data["regions"]),
                parameters,
                int(data["fixed_bytes"]),
                tuple(data["activation_policy"]),
                prediction,
                data["estimated"],
                data["reserve_bytes"],
                tuple(data["chosen"]),
                tuple((words, size) for words, size in data["rejected"]),
                tuple(data["nearest"]),
                data["keep_logits"],
                data["micro_batches"],
                {name: tuple(shape) for name, shape in data["batch"].items()},
                data["device"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise SettingError(f"not a plan that galore_fx wrote: {error!r}") from error
