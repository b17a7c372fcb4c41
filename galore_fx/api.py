"""Defines ``galore_fx.compile`` and ``galore_fx.plan``."""

import weakref
from typing import Any

import torch
from torch import nn

from galore_fx.assembly.assemble import Forwards, assemble
from galore_fx.assembly.compiled_model import Compiled
from galore_fx.assembly.decisions import decide, decide_as_planned
from galore_fx.assembly.device_memory import enforce_budget
from galore_fx.assembly.plan_parameters import check_budget
from galore_fx.assembly.reparametrize import normalized
from galore_fx.assembly.request import Request
from galore_fx.assembly.user_optimizer import OptimizerChoice
from galore_fx.errors import SettingError
from galore_fx.passes.model_graph.head_compiler import HeadCompiler
from galore_fx.passes.model_graph.normalize_weights import Normalization
from galore_fx.passes.model_graph.region_compiler import RegionCompiler
from galore_fx.plan_record import Plan
from galore_fx.planner.batch_guard import PlannedBatch
from galore_fx.planner.budget_search import decide_for_sample
from galore_fx.planner.plan_first_batch import TrainingCheck, plan_for_arguments, plan_for_first_batch
from galore_fx.planner.verify_peak import watch_peak
from galore_fx.recipes.recipe import Recipe
from galore_fx.simulation.fake_model import check_sample


def plan(
    model: nn.Module,
    budget: str | int | None = None,
    *,
    sample: object = None,
    recipe: str | Recipe = "auto",
    optimizer: OptimizerChoice = torch.optim.AdamW,
    keep_logits: bool = False,
    micro_batches: int = 1,
    device: str | None = None,
    reserve: str | int | None = None,
    **overrides: Any,
) -> Plan:
    """Returns the plan that ``compile`` would carry out, from shapes alone; the model stays unchanged.

    With a sample a whole step is simulated, and the plan contains its peak. A budget then settles what the user leaves
    open: the share of activations that each block keeps, the update mode, the number of blocks that refresh in one
    update, and for recipe "auto" full rank or a lower one.

    Args:
        model, budget, sample, recipe, optimizer, keep_logits, micro_batches, reserve, **overrides: as in ``compile``.
        device: device to train on, "cpu" or "cuda". The default is the model's, and "cuda" for a model on the meta
            device.

    Returns:
        The plan. A budget that cannot hold the training is no error here: ``Plan.within_budget`` is False then, and
        so is ``Plan.fits`` unless only an estimate exceeds the budget.

    Raises:
        SettingError, ModelError, OptimizerError: as in ``compile``; also SettingError for an unknown device.
    """
    if device not in (None, "cpu", "cuda"):
        raise SettingError(f"device={device!r} is not 'cpu' or 'cuda'; leave it out for where the model is")
    request = Request(budget, sample, recipe, optimizer, overrides, keep_logits, micro_batches, device, reserve)
    with normalized(model, request) as (asked, _):
        return (decide(model, asked) if sample is None else decide_for_sample(model, asked)).plan


def compile(  # noqa: A001 - the name users know from torch.compile
    model: nn.Module,
    budget: str | int | None = None,
    *,
    sample: object = None,
    recipe: str | Recipe = "auto",
    optimizer: OptimizerChoice = torch.optim.AdamW,
    keep_logits: bool = False,
    micro_batches: int = 1,
    reserve: str | int | None = None,
    plan: Plan | None = None,
    enforce: bool = False,
    strict: bool = False,
    **overrides: Any,
) -> nn.Module:
    """Compiles a model in place so that all its parameters train in little memory.

    Args:
        model: the model, on the device and in the dtype it will train in.
        budget: bytes that the training may take: ``"16GB"``, ``"15.5GiB"`` or an int; ``"auto"`` for the free memory of
            the model's device plus the model's own; None for no check.
        sample: a training batch as the model takes it, with the shapes to train with. It is checked on fake tensors
            before anything changes. With a budget, a step is simulated and the plan is chosen so that its peak fits.
            With a budget and no sample, the first training batch is simulated before it runs. Only the share of kept
            activations and the number of blocks that refresh in one update can still be chosen then.
        recipe: the name of one of ``galore_fx.RECIPES``, or a ``Recipe``.
        optimizer: a ``torch.optim`` class, a ``functools.partial`` of one (``partial(AdamW, lr=1e-3)``), or an
            instance over the model's parameters, which then refuses its own ``step()``.
        keep_logits: whether to return ``outputs.logits`` in training too. By default they are None if the model
            computes its loss from them by plain cross-entropy: the logits then never exist as a whole.
        micro_batches: backwards per ``step()`` that the budget is planned for; gradients live through the next one.
        reserve: bytes of the budget kept free for memory that the simulation does not cover. The default is 0 on a
            CPU, and on CUDA 600 MiB for context and workspaces plus a tenth of the peak for fragmentation.
        plan: an existing plan to carry out, from ``galore_fx.plan`` or ``Plan.from_json``. It settles every decision,
            so only ``optimizer``, ``enforce`` and ``strict`` may accompany it.
        enforce: on CUDA, whether an allocation beyond the budget is an out-of-memory error of this process.
        strict: whether a block that cannot be captured as one graph raises CaptureError when it is called, instead of
            training uncompiled with a warning.
        **overrides: parts of the recipe: ``rank=128``, ``refresh_gap=200``, ``update="in-backward"``, ...

    Returns:
        The same module. ``model.galore_fx`` has ``.optimizer`` (step it), ``.plan`` and ``.stats()``.

    Raises:
        SettingError: a recipe or override is unknown, a value is not allowed, arguments exclude each other, or an
            unsupported torch mode is on (compiled autograd, CUDA graphs).
        ModelError: the model has no linear layer to project, does not accept the sample, is already compiled, or is
            not the one of ``plan``.
        OptimizerError: the optimizer is over other parameters, or its step cannot be lowered.
        BudgetError: no plan fits the budget (with a sample), or the bytes kept through the step already exceed it.
        All are raised before anything in the model changes. With a budget and no sample the first training call may
        raise ModelError or BudgetError, before it runs.
    """
    request = Request(budget, sample, recipe, optimizer, overrides, keep_logits, micro_batches, reserve=reserve)
    if plan is not None:
        if not isinstance(plan, Plan):
            raise SettingError(
                f"plan={plan!r:.60} is a {type(plan).__name__}; galore_fx.plan makes plans, Plan.from_json reads them"
            )
        _refuse_beside_plan(request)
        request = Request(recipe=plan.recipe, optimizer=optimizer)
    with normalized(model, request) as (asked, normalization):
        compiled = _compiled(model, asked, plan, normalization, enforce=enforce, strict=strict)
        if normalization is not None:
            normalization.keep()
    model.galore_fx = compiled  # type: ignore[assignment]
    return model


def _compiled(
    model: nn.Module,
    request: Request,
    plan: Plan | None,
    normalization: Normalization | None,
    *,
    enforce: bool,
    strict: bool,
) -> Compiled:
    if plan is not None:
        decisions = decide_as_planned(model, plan, request.optimizer)
    else:
        with_budget = request.sample is not None and request.budget is not None
        decisions = decide_for_sample(model, request) if with_budget else decide(model, request)
        if request.sample is not None and not with_budget:
            check_sample(model, request.sample)
    made = decisions.plan
    check_budget(made)
    if enforce:
        enforce_budget(model, made.budget_bytes)
    if normalization is not None and decisions.recipe.weight_bits is not None:
        normalization.keep()  # checks have passed; do not hold the originals of 8-bit weights
    head = None if request.keep_logits or made.keep_logits else HeadCompiler()
    assembled = assemble(model, decisions, request.optimizer, RegionCompiler(), Forwards(head, strict))
    whole = assembled.installed.whole
    warn_of_eval = weakref.WeakMethod(whole.warn_of_eval)  # so an optimizer does not keep its model alive
    assembled.optimizer.register_step_pre_hook(lambda *_: warn() if (warn := warn_of_eval()) is not None else None)
    compiled = Compiled(assembled)
    whole.check = TrainingCheck(
        PlannedBatch(model, made.batch, plan_for_arguments(model, compiled)) if made.batch else None,
        plan_for_first_batch(model, request, assembled, compiled) if plan is None and made.is_without_batch else None,
        watch_peak(model, assembled.optimizer, made),
    )
    return compiled


def _refuse_beside_plan(request: Request) -> None:
    default = Request(optimizer=request.optimizer)
    given = [name for name, value in vars(request).items() if value != getattr(default, name)]
    if given:
        raise SettingError(
            f"plan= says all that there is to decide, and {', '.join(given)} cannot be given beside it; make a new "
            "plan with galore_fx.plan"
        )
