"""Makes all decisions of ``compile``, ``plan``, the backend and ``explain`` before anything in the model changes."""

import dataclasses
import warnings

from torch import nn
from torch.optim import Optimizer

from galore_fx.assembly.device_memory import available_bytes
from galore_fx.assembly.plan_parameters import fixed_bytes, plan_parameters
from galore_fx.assembly.refresh_cost import refresh_costs
from galore_fx.assembly.request import Request
from galore_fx.assembly.user_model import check_model
from galore_fx.assembly.user_optimizer import OptimizerChoice, resolve_optimizer
from galore_fx.errors import ModelError, SettingError
from galore_fx.passes.model_graph.find_regions import Region, find_regions
from galore_fx.passes.model_graph.parameter_roles import parameter_roles
from galore_fx.passes.optimizer_graph.update_compiler import UpdateCompiler, Variants
from galore_fx.plan_record import ParameterPlan, Plan
from galore_fx.recipes.presets import resolve_recipe
from galore_fx.recipes.recipe import Recipe
from galore_fx.runtime.formats.quantized_tensor import QuantizedTensor
from galore_fx.runtime.layers.normalized_linear import trained_parts
from galore_fx.runtime.subspace.moment_transfer import check_rotates
from galore_fx.runtime.subspace.refresh_queue import RefreshLimits
from galore_fx.runtime.torch_private import refuse_unsupported_modes
from galore_fx.units import format_bytes, parse_bytes


@dataclasses.dataclass(frozen=True)
class Decisions:
    """The outcome of all checks. Nothing has changed yet.

    Attributes:
        recipe: the recipe in force.
        regions: the regions of the model.
        optimizer: instance over the model's parameters; its groups and defaults are used, never its step.
        updates: compiler of the optimizer's updates.
        plan: the decision for each parameter.
    """

    recipe: Recipe
    regions: list[Region]
    optimizer: Optimizer
    updates: UpdateCompiler
    plan: Plan


def decide(model: nn.Module, request: Request, variants: Variants | None = None) -> Decisions:
    """Resolves and checks a request.

    Args:
        model: the model; it stays unchanged.
        request: arguments of the user; the sample is not used here.
        variants: store of compiled steps, separate from that of the process, for a simulation.

    Raises:
        SettingError, ModelError, OptimizerError: as in ``galore_fx.compile``.
    """
    refuse_unsupported_modes()
    resolved = resolve_recipe(request.recipe, request.overrides)
    micro_batches = request.micro_batches
    if isinstance(micro_batches, bool) or not isinstance(micro_batches, int) or micro_batches < 1:
        raise SettingError(f"micro_batches={micro_batches!r} must be an int of at least 1")
    if micro_batches > 1 and resolved.update == "in-backward":
        raise SettingError(f"micro_batches={micro_batches} accumulate gradients, which update='in-backward' cannot")
    if request.reserve:
        parse_bytes(request.reserve, "reserve")
    budget = request.budget
    check_model(model)
    budget_bytes = (
        None if budget is None else available_bytes(model, request.device) if budget == "auto" else parse_bytes(budget)
    )
    regions = find_regions(model)
    if resolved.weight_norm is None and trained_parts(model):
        raise ModelError(
            "the model's layers are normalised (a copy of one compiled with weight_norm); compile it with weight_norm, "
            "or load what its save_pretrained has written into a plain model"
        )
    if resolved.merge_factors and any(isinstance(part, QuantizedTensor) for part in model.parameters()):
        raise SettingError(
            "merge_factors=True adds to frozen weights, and this model (a copy of one compiled with weight_bits) "
            "stores them as codes; load what its save_pretrained has written into a plain model, or leave it out"
        )
    instance = resolve_optimizer(request.optimizer, model)
    updates = UpdateCompiler(type(instance), instance.defaults, variants, state_bits=resolved.state_bits)
    for group in instance.param_groups:
        updates.check(group)
    layout = updates.layout(updates.read(instance.param_groups[0]), instance.param_groups[0])
    made = plan_parameters(
        [(name, p) for name, p in model.named_parameters() if p.requires_grad],
        regions,
        parameter_roles(model, regions),
        resolved,
        optimizer=type(instance).__name__,
        num_state_tensors=len(layout.initial),
        state_format=layout.format,
        num_state_scalars=len(layout.scalars),
        budget_bytes=budget_bytes,
        fixed_bytes=fixed_bytes(model, resolved),
    )
    if resolved.projects and resolved.moments_on_refresh == "rotate":
        _check_rotation(model, made, instance, updates)
    _check_refreshes(regions, made, resolved)
    made = dataclasses.replace(made, keep_logits=request.keep_logits, micro_batches=micro_batches)
    return Decisions(resolved, regions, instance, updates, made)


def _check_rotation(model: nn.Module, plan: Plan, optimizer: Optimizer, updates: UpdateCompiler) -> None:
    """Checks that the optimizer states of all projected weights can be rotated.

    Raises:
        OptimizerError: names the states that cannot.
    """
    projected = {entry.name for entry in plan.parameters if entry.rank is not None}
    keys = {id(parameter) for name, parameter in model.named_parameters() if name in projected}
    for group in optimizer.param_groups:
        if not keys.isdisjoint(map(id, group["params"])):
            check_rotates(updates.layout(updates.read(group), group), type(optimizer).__name__)


def refresh_limits(recipe: Recipe) -> RefreshLimits:
    """Returns the recipe's limits on the refreshes of one update."""
    return RefreshLimits(recipe.refresh_limit, recipe.refresh_limit_bytes, recipe.refresh_limit_s)


def _check_refreshes(regions: list[Region], plan: Plan, recipe: Recipe) -> None:
    """Checks that the limits let every basis refresh once within the gap.

    Raises:
        SettingError: names the limits that are too low.
    """
    limits = refresh_limits(recipe)
    costs = refresh_costs(regions, plan.parameters, recipe)
    given = ("refresh_limit", "refresh_limit_bytes", "refresh_limit_s")
    told = ", ".join(f"{part}={getattr(recipe, part)!r}" for part in given if getattr(recipe, part) is not None)
    for index, cost in costs.items():
        if not limits.allow(1, cost):
            raise SettingError(
                f"{told} is less than what the refresh of {regions[index].name or 'the model'} alone takes: "
                f"{format_bytes(cost.num_bytes)} and {cost.time_s:.3g} s"
            )
    num_updates = limits.num_turns(costs.values())
    if num_updates > recipe.refresh_gap:
        raise SettingError(
            f"{told} with refresh_gap={recipe.refresh_gap}: the {len(costs)} blocks take {num_updates} updates to "
            f"renew all bases once; allow more in one update, or use refresh_gap={num_updates} or more"
        )


def decide_as_planned(model: nn.Module, plan: Plan, optimizer: OptimizerChoice) -> Decisions:
    """Returns the decisions of an existing plan after comparing it with the model.

    A plan for another device causes a warning.

    Raises:
        ModelError: the plan is for another model or optimizer; the message names the difference.
        SettingError, OptimizerError: as in ``decide``.
    """
    decisions = decide(model, Request(recipe=plan.recipe, optimizer=optimizer))
    made = decisions.plan
    for what, theirs, ours in (
        ("optimizer", plan.optimizer, made.optimizer),
        ("blocks", plan.regions, made.regions),
        ("parameters", [_identity(p) for p in plan.parameters], [_identity(p) for p in made.parameters]),
        ("frozen parameters and buffers, in bytes", str(plan.fixed_bytes), str(made.fixed_bytes)),
    ):
        if theirs != ours:
            differing = next(((a, b) for a, b in zip(theirs, ours, strict=False) if a != b), (len(theirs), len(ours)))
            shown = (theirs, ours) if isinstance(theirs, str) else differing
            raise ModelError(
                f"the plan was made for other {what}: {shown[0]} in the plan, {shown[1]} in this model. Another "
                "dtype or shape is enough for that; make a new plan with galore_fx.plan"
            )
    here = next(model.parameters()).device.type
    if plan.device not in (None, here):
        warnings.warn(
            f"the plan was made for {plan.device} and the model is on {here}, where its prediction does not hold",
            stacklevel=3,
        )
    return dataclasses.replace(decisions, plan=plan)


def _identity(parameter: ParameterPlan) -> tuple[object, ...]:
    return parameter.name, parameter.shape, parameter.rank, parameter.dim, tuple(parameter.bytes.items())
