"""Compares simulated ways of training one model, side by side."""

from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import galore_fx
from galore_fx.passes.model_graph.find_regions import find_regions
from galore_fx.units import format_bytes

LORA_RANK = 16
# All savings that cost no quality, including 8-bit states as in bitsandbytes.
_SPARING = {"recipe": "full", "update": "in-backward", "activation_budget": 0.0, "state_bits": 8}


def compare(make_model: Callable[[], nn.Module], sample: Any, chosen: galore_fx.Plan, device: str) -> str:
    """Returns a table of each way of training: bytes by category at the peak, and whether it fits the plan's budget.

    A second table compares the optimizer memory (``optimizer_memory``).

    Args:
        make_model: creates the model, on the meta device.
        sample: a batch as the model takes it.
        chosen: the plan to compare with.
        device: as in ``galore_fx.plan``.
    """

    def planned(model: nn.Module, **settings: Any) -> galore_fx.Plan:
        return galore_fx.plan(model, sample=sample, device=device, **settings)

    ways = {
        "AdamW": planned(make_model(), recipe="full", keep_logits=True),
        "8-bit AdamW, chunked loss, recompute, update in backward": planned(make_model(), **_SPARING),
        f"LoRA r={LORA_RANK}": planned(with_lora(make_model()), recipe="full", keep_logits=True),
        "galore": planned(make_model(), recipe="galore"),
        f"chosen: {chosen.recipe.name}": chosen,
    }
    names = list(dict.fromkeys(name for plan in ways.values() for name, size in plan.categories.items() if size))
    rows = []
    for way, plan in ways.items():
        budget = chosen.budget_bytes
        fits = "" if budget is None else "fits" if plan.peak_bytes <= budget else "does not fit"
        sizes = [format_bytes(plan.categories.get(name, 0)) for name in names]
        rows.append((way, *sizes, format_bytes(plan.peak_bytes), fits))
    peaks = tabulate(
        rows, headers=("way of training", *names, "peak", ""), maxcolwidths=[24, *[None] * (len(names) + 2)]
    )
    return f"{peaks}\n\n{optimizer_memory(make_model, chosen)}"


def optimizer_memory(make_model: Callable[[], nn.Module], chosen: galore_fx.Plan) -> str:
    """Returns a table of optimizer memory: the plan's, and AdamW's with states in float32 or the weights' dtype."""
    ways = {
        "AdamW, states in float32": galore_fx.plan(make_model(), recipe="full", state_bits=32),
        "AdamW, states as the weights": galore_fx.plan(make_model(), recipe="full"),
        f"chosen: {chosen.recipe.name}": chosen,
    }
    whole = {way: _kept(plan, "optimizer_state") + _kept(plan, "bases") for way, plan in ways.items()}
    rows = []
    for way, plan in ways.items():
        parts = [format_bytes(_kept(plan, name)) for name in ("optimizer_state", "bases", "factors")]
        shares = [f"{whole[way] / whole[other] - 1:+.1%}" for other in list(ways)[:2]]
        rows.append((way, *parts[:2], format_bytes(whole[way]), *shares, parts[2]))
    headers = ("optimizer memory", "states", "bases", "both", "to float32", "to the weights' dtype", "beside: factors")
    return tabulate(rows, headers=headers, maxcolwidths=[24, *[None] * 6])


def _kept(plan: galore_fx.Plan, category: str) -> int:
    return sum(parameter.bytes[category] for parameter in plan.parameters)


class LoraLinear(nn.Module):
    """A frozen linear layer plus two trained low-rank factors (Hu et al. 2021, arXiv:2106.09685, section 4.1)."""

    def __init__(self, base: nn.Module, num_in: int, num_out: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(num_in, LORA_RANK, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(LORA_RANK, num_out, bias=False, dtype=base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``x`` (..., in) to (..., out)."""
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


def with_lora(model: nn.Module) -> nn.Module:
    """Adds LoRA to every linear layer of the model's blocks and freezes all else; changes and returns the model."""
    regions = find_regions(model)
    weights = {id(w.weight): w for region in regions for w in region.weights}
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        found = weights.get(id(getattr(module, "weight", None)))
        if found is not None:
            owner, _, key = name.rpartition(".")
            shape = found.weight.shape if found.in_first else found.weight.shape[::-1]
            with torch.device(found.weight.device):
                setattr(model.get_submodule(owner), key, LoraLinear(module, *shape))
    return model
