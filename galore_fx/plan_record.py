"""The plan as data: what is done to each parameter, and the bytes that follow from it. No torch in here.

With a sample the plan holds the prediction of a simulated step. Without one it is the sum of what is kept through the
step: activations, the loss and passing workspaces are not in it, and it says so.
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
    """One parameter.

    Attributes:
        name: qualified name in the model.
        shape: of the weight.
        region: index of the region whose refreshes it shares; None where it is trained at full rank.
        dim: "rows" or "cols", the projected dimension; None at full rank.
        rank: the rank in force; None at full rank.
        bytes: bytes by category (``CATEGORIES``).
        reason: what it is in the model, which is why it is projected or not.
        shared_with: its other names, where several modules use it.
        weight_bits: of a stored code, None where it is stored in its own dtype.
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
    """What a simulated training step takes.

    Attributes:
        peak_bytes: highest number of bytes alive at once, in a steady or refreshing step or in evaluation.
        phases: highest number in each phase: load, forward, backward, update, the same of a refreshing step, refresh,
            eval, save.
        categories: bytes at the peak by category.
        timeline: (phase, bytes by category) through a steady step: the highest moment of each scene, block by block.
        uncaptured: blocks that run uncompiled.
        seconds: time of each phase of a steady step by a roofline: for comparing plans, no promise.
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
    """What a compiled model does with memory.

    Attributes:
        recipe: the recipe in force.
        optimizer: name of the optimizer class.
        budget_bytes: the budget, None without one.
        regions: names of the modules that are compiled as one graph each.
        parameters: one entry per trained parameter.
        fixed_bytes: bytes of frozen parameters and buffers.
        activation_policy: for each region the share of its activations that it keeps for the backward.
        prediction: what a simulated step takes, None where no sample was given.
        estimated: whether the prediction is for a device on which it has not been verified.
        reserve_bytes: kept free for what the simulation cannot see.
        chosen: settings that the planner has chosen to meet the budget, in words.
        rejected: settings that give up less, in words, and the bytes that they need at least.
        nearest: where nothing fits, changes that would, in words.
        keep_logits: as of ``compile``.
        micro_batches: as of ``compile``.
        batch: shapes of the sample's tensors by argument, which a training call may not exceed; empty for any.
        device: "cpu" or "cuda", for which the prediction is; None without one.
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
        """Bytes by category at the predicted peak; without a prediction, what is kept through the step."""
        if self.prediction is None:
            return self.kept
        return {**self.prediction.categories, "reserve": self.reserve_bytes}

    @property
    def phases(self) -> dict[str, int]:
        """Predicted peak of each phase, without the reserve; empty without a prediction."""
        return {} if self.prediction is None else dict(self.prediction.phases)

    @property
    def kept(self) -> dict[str, int]:
        """Bytes by category, summed over the parameters; gradients as many as the update mode holds at once."""
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
        """Predicted peak of a whole step, reserve included; without a prediction a lower bound of it."""
        return sum(self.categories.values())

    @property
    def is_without_batch(self) -> bool:
        """Whether there is a budget and no batch was simulated for it."""
        return self.budget_bytes is not None and self.prediction is None

    @property
    def seconds(self) -> float:
        """Predicted time of a steady step of at most two micro-batches, for comparing plans; 0 without a prediction."""
        return 0.0 if self.prediction is None else sum(self.prediction.seconds.values())

    @property
    def within_budget(self) -> bool:
        """Whether ``peak_bytes``, whatever it is worth, is no more than the budget."""
        return self.budget_bytes is None or self.peak_bytes <= self.budget_bytes

    @property
    def fits(self) -> bool | None:
        """Whether the step fits the budget; None where that is not known: no budget, no sample, or only an estimate."""
        if self.budget_bytes is None:
            return None
        if sum(self.kept.values()) > self.budget_bytes:
            return False
        return None if self.prediction is None or self.estimated else self.within_budget

    def table(self) -> str:
        """The categories as text, with what is not counted named."""
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
        """The plan, and the figures that follow from it, as JSON."""
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
        """The plan that ``to_json`` wrote.

        Raises:
            SettingError: not such a plan.
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
