"""``galore_fx.compile`` and ``galore_fx.plan``: all checks and decisions first, then the changes to the model."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from galore_fx.errors import ModelError
from galore_fx.handle import Compiled
from galore_fx.optimizer_choice import OptimizerChoice, resolve_optimizer, retire
from galore_fx.passes.memory_plan.plan_parameters import check_budget, plan_parameters
from galore_fx.passes.model_graph.find_regions import Region, find_regions, find_stems
from galore_fx.passes.model_graph.head_compiler import compile_head
from galore_fx.passes.model_graph.region_compiler import RegionCompiler
from galore_fx.passes.optimizer_graph.update_compiler import UpdateCompiler
from galore_fx.plan_record import Plan
from galore_fx.recipe import Recipe, resolve_recipe
from galore_fx.runtime.compatibility import dispatch_compiler, refuse_unsupported_modes
from galore_fx.runtime.dispatch import (
    ClearingZeroGrad,
    CompiledForward,
    OpaqueForward,
    RegionFunction,
    TrainingForward,
    own_code_object,
)
from galore_fx.runtime.optimizer import SubspaceOptimizer
from galore_fx.runtime.projected_parameter import REGISTRY, ProjectedParameter
from galore_fx.runtime.refresh_schedule import SUBSPACE_ITERATION_WARM_UP, FixedSchedule
from galore_fx.runtime.subspace import ProjectedDim, random_basis
from galore_fx.sample_check import check_sample
from galore_fx.units import parse_bytes

# Forms of one region's graph before it counts as a defect: shapes, masks and modes of a batch, not layers.
_RECOMPILE_LIMIT = 64
_SEED = 0


@dataclasses.dataclass(frozen=True)
class _Decisions:
    """Everything that ``compile`` acts on."""

    recipe: Recipe
    regions: list[Region]
    optimizer: torch.optim.Optimizer
    updates: UpdateCompiler
    plan: Plan


def plan(
    model: nn.Module,
    budget: str | int | None = None,
    *,
    sample: object = None,
    recipe: str | Recipe = "auto",
    optimizer: OptimizerChoice = torch.optim.AdamW,
    **overrides: Any,
) -> Plan:
    """What ``compile`` would do to the model, from shapes alone; changes nothing.

    Takes what ``compile`` takes, and raises what it raises, with one exception: a budget that cannot hold what is kept
    is said by ``Plan.fits``.
    """
    return _decide(model, budget, sample, recipe, optimizer, overrides).plan


def compile(  # noqa: A001 - the name users know from torch.compile
    model: nn.Module,
    budget: str | int | None = None,
    *,
    sample: object = None,
    recipe: str | Recipe = "auto",
    optimizer: OptimizerChoice = torch.optim.AdamW,
    keep_logits: bool = False,
    strict: bool = False,
    **overrides: Any,
) -> nn.Module:
    """Compiles a model in place so that all its parameters train in little memory.

    Args:
        model: the model, on the device and in the dtype it will train in.
        budget: bytes the training may take, ``"16GB"``, ``"15.5GiB"`` or an int; None for no check.
        sample: a batch as the model takes it, checked on fake tensors before anything changes.
        recipe: ``"auto"``, ``"galore"`` or ``"full"``, or a ``Recipe``.
        optimizer: a ``torch.optim`` class, a ``functools.partial`` of one (``partial(AdamW, lr=1e-3)``), or an
            instance over the model's parameters, which then refuses its own ``step()``.
        keep_logits: return ``outputs.logits`` in training too. Without it they are None where the model computes its
            loss from them by plain cross-entropy: the logits then never exist as a whole.
        strict: raise where a block cannot be captured as one graph, instead of training it uncompiled with a warning.
        **overrides: parts of the recipe: ``rank=128``, ``refresh_gap=200``, ``update="in-backward"``, ...

    Returns:
        The same module. ``model.galore_fx`` has ``.optimizer`` (step it), ``.plan`` and ``.stats()``.

    Raises:
        SettingError: an unknown recipe or override, a value that is not allowed, or a mode of torch's that is not
            supported (compiled autograd, CUDA graphs).
        ModelError: no linear layer to project, a sample the model does not accept, a model already compiled.
        OptimizerError: an optimizer over other parameters, or one whose step cannot be lowered.
        BudgetError: what is kept through the step already exceeds the budget.
        All are raised before anything in the model is changed.
    """
    decisions = _decide(model, budget, sample, recipe, optimizer, overrides)
    built = _build(model, decisions, optimizer)
    compiler, forwards = _install(model, decisions, keep_logits, strict)
    model.galore_fx = Compiled(built.optimizer, built.plan, compiler, built.updates, forwards)  # type: ignore[assignment]
    return model


@dataclasses.dataclass(frozen=True)
class BuiltOptimizer:
    """An optimizer over a model's parameters, and what it was made from."""

    optimizer: SubspaceOptimizer
    updates: UpdateCompiler
    plan: Plan


def build_optimizer(
    model: nn.Module,
    budget: str | int | None,
    recipe: str | Recipe,
    optimizer: OptimizerChoice,
    overrides: dict[str, Any],
) -> BuiltOptimizer:
    """The optimizer of a model whose graph is captured elsewhere; its arguments and errors are those of ``compile``."""
    return _build(model, _decide(model, budget, None, recipe, optimizer, overrides), optimizer)


def _build(model: nn.Module, decisions: _Decisions, given: OptimizerChoice) -> BuiltOptimizer:
    check_budget(decisions.plan)
    records, layers = _make_records(decisions)
    optimizer = _make_optimizer(decisions, records, layers)
    if decisions.optimizer is given:
        retire(decisions.optimizer)
    model.zero_grad = ClearingZeroGrad(model, optimizer.zero_grad)  # type: ignore[method-assign]
    return BuiltOptimizer(optimizer, decisions.updates, decisions.plan)


def _decide(
    model: nn.Module,
    budget: str | int | None,
    sample: object,
    recipe: str | Recipe,
    optimizer: OptimizerChoice,
    overrides: dict[str, Any],
) -> _Decisions:
    refuse_unsupported_modes()
    resolved = resolve_recipe(recipe, overrides)
    budget_bytes = None if budget is None else parse_bytes(budget)
    if not isinstance(model, nn.Module):
        raise ModelError(f"a {type(model).__name__} is not an nn.Module")
    if hasattr(model, "_orig_mod"):
        raise ModelError(
            "this is what torch.compile returned; give galore_fx.compile the module itself, or use "
            "torch.compile(model, backend='galore_fx') and galore_fx.optimizer(model)"
        )
    if isinstance(getattr(model, "galore_fx", None), Compiled):
        raise ModelError(f"this {type(model).__name__} is compiled already; compile a fresh or deep-copied one")
    regions = find_regions(model)
    instance = resolve_optimizer(optimizer, model)
    updates = UpdateCompiler(type(instance), instance.defaults)
    for group in instance.param_groups:
        updates.check(group)
    if sample is not None:
        check_sample(model, sample)
    layout = updates.layout(updates.read(instance.param_groups[0]), instance.param_groups[0])
    made = plan_parameters(
        [(name, p) for name, p in model.named_parameters() if p.requires_grad],
        regions,
        resolved,
        optimizer=type(instance).__name__,
        num_state_tensors=len(layout.initial),
        num_state_scalars=len(layout.scalars),
        budget_bytes=budget_bytes,
        fixed_bytes=sum(b.nbytes for b in model.buffers())
        + sum(p.nbytes for p in model.parameters() if not p.requires_grad),
    )
    return _Decisions(resolved, regions, instance, updates, made)


def _make_records(decisions: _Decisions) -> tuple[list[ProjectedParameter], list[int]]:
    """One record per projected parameter of the plan, and the region it belongs to."""
    weights = {w.name: w.weight for region in decisions.regions for w in region.weights}
    generator = torch.Generator().manual_seed(_SEED)
    records, layers = [], []
    for entry in decisions.plan.parameters:
        if entry.rank is None or entry.dim is None or entry.region is None:
            continue
        weight, dim = weights[entry.name], ProjectedDim(entry.dim)
        shape = dim.basis_shape((entry.shape[0], entry.shape[1]), entry.rank)
        basis = random_basis(shape, generator).to(weight)
        record = ProjectedParameter.create(entry.name, weight, dim, entry.rank, basis)
        REGISTRY.add(record)
        records.append(record)
        layers.append(entry.region)
    return records, layers


def _make_optimizer(decisions: _Decisions, records: list[ProjectedParameter], layers: list[int]) -> SubspaceOptimizer:
    recipe, exact = decisions.recipe, decisions.recipe.basis == "svd"
    schedule = FixedSchedule(
        recipe.refresh_gap, len(decisions.regions), recipe.stagger, 1 if exact else SUBSPACE_ITERATION_WARM_UP
    )
    return SubspaceOptimizer(
        decisions.optimizer.param_groups,
        decisions.optimizer.defaults,
        updates=decisions.updates,
        records=records,
        layers=layers,
        schedule=schedule,
        exact=exact,
        scale=recipe.scale,
        in_backward=recipe.update == "in-backward",
        max_grad_norm=recipe.max_grad_norm,
    )


def _forward_function(module: nn.Module) -> Callable[..., Any]:
    """What a call of the module runs, taking the module first: its class's forward, or one set on the instance."""
    own = vars(module).get("forward")
    if own is None:
        function: Callable[..., Any] = type(module).forward
        return function

    def forward(_module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    return forward


def _install(
    model: nn.Module, decisions: _Decisions, keep_logits: bool, strict: bool
) -> tuple[RegionCompiler, list[CompiledForward]]:
    """Puts the dispatchers in place: one compiled function per forward function, shared by the layers that use it."""
    compiler = RegionCompiler()
    functions: dict[object, RegionFunction] = {}
    forwards: list[CompiledForward] = []
    for region in decisions.regions:
        module = region.module
        function = _forward_function(module)
        if function not in functions:
            functions[function] = RegionFunction(
                dispatch_compiler(own_code_object(function), compiler, recompile_limit=_RECOMPILE_LIMIT), strict
            )
        forwards.append(CompiledForward(region.name, module, module.forward, functions[function]))
        module.forward = forwards[-1]
    training = None
    stems = find_stems(model, decisions.regions)
    if stems and "forward" not in vars(model) and not keep_logits:
        for stem in stems:
            stem.forward = OpaqueForward(stem, stem.forward)
        training = dispatch_compiler(
            own_code_object(type(model).forward), compile_head, recompile_limit=_RECOMPILE_LIMIT, whole=False
        )
    model.forward = TrainingForward(model, model.forward, training)
    return compiler, forwards
