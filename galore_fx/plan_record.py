"""The plan as data: what is done to each parameter, and the bytes that follow from it. No torch in here.

This first plan is a sum of what is kept through the whole step. Activations, the loss and passing workspaces are not
in it, and it says so: it is a lower bound of the peak, not a prediction.
"""

import dataclasses
import json
from typing import Any

from tabulate import tabulate

from galore_fx.errors import SettingError
from galore_fx.units import format_bytes

CATEGORIES = ("weights", "bases", "optimizer_state", "gradients")
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
    """

    name: str
    shape: tuple[int, ...]
    region: int | None
    dim: str | None
    rank: int | None
    bytes: dict[str, int]
    reason: str = ""
    shared_with: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a compiled model does with memory.

    Attributes:
        recipe: the recipe's parts in force, by name.
        optimizer: name of the optimizer class.
        budget_bytes: the budget, None without one.
        regions: names of the modules that are compiled as one graph each.
        parameters: one entry per trained parameter.
        fixed_bytes: bytes of frozen parameters and buffers.
    """

    recipe: dict[str, Any]
    optimizer: str
    budget_bytes: int | None
    regions: tuple[str, ...]
    parameters: tuple[ParameterPlan, ...]
    fixed_bytes: int

    @property
    def categories(self) -> dict[str, int]:
        """Bytes by category, summed over the parameters; gradients as many as the update mode holds at once."""
        sizes = {name: sum(p.bytes[name] for p in self.parameters) for name in CATEGORIES}
        sizes["weights"] += self.fixed_bytes
        if self.recipe["update"] == "in-backward":
            by_region: dict[object, int] = {}
            for p in self.parameters:
                key = p.name if p.region is None else p.region
                by_region[key] = by_region.get(key, 0) + p.bytes["gradients"]
            sizes["gradients"] = max(by_region.values(), default=0)
        return sizes

    @property
    def peak_bytes(self) -> int:
        """A lower bound of the step's peak: everything in ``categories`` at once."""
        return sum(self.categories.values())

    @property
    def fits(self) -> bool | None:
        """False where even the lower bound exceeds the budget; None (not known) otherwise."""
        return False if self.budget_bytes is not None and self.peak_bytes > self.budget_bytes else None

    def table(self) -> str:
        """The categories as text, with what is not counted named."""
        rows = [(name, format_bytes(size)) for name, size in self.categories.items()]
        rows += [(name, "not counted") for name in NOT_COUNTED]
        rows.append(("kept through the step", format_bytes(self.peak_bytes)))
        if self.budget_bytes is not None:
            rows.append(("budget", format_bytes(self.budget_bytes)))
        num_projected = sum(p.rank is not None for p in self.parameters)
        title = (
            f"recipe {self.recipe['name']}, {self.optimizer}, {self.recipe['update']} update: "
            f"{num_projected} of {len(self.parameters)} parameters projected"
        )
        return f"{title}\n{tabulate(rows, headers=('category', 'bytes'), colalign=('left', 'right'))}"

    def to_json(self) -> str:
        """The plan, and the figures that follow from it, as JSON."""
        figures = {
            "peak_bytes": self.peak_bytes,
            "peak_is": "lower bound",
            "budget_bytes": self.budget_bytes,
            "fits": self.fits,
            "categories": self.categories,
            "not_counted": NOT_COUNTED,
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
            parameters = tuple(
                ParameterPlan(**{**entry, "shape": tuple(entry["shape"]), "shared_with": tuple(entry["shared_with"])})
                for entry in data["parameters"]
            )
            regions, fixed_bytes = tuple(data["regions"]), int(data["fixed_bytes"])
            return cls(data["recipe"], data["optimizer"], data["budget_bytes"], regions, parameters, fixed_bytes)
        except (ValueError, KeyError, TypeError) as error:
            raise SettingError(f"not a plan that galore_fx wrote: {error!r}") from error
