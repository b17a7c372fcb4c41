"""``galore_fx.compile`` and ``galore_fx.plan``."""

from typing import Any

import torch
from torch import nn

from galore_fx.choice import decide_for_sample
from galore_fx.decisions import decide
from galore_fx.handle import Compiled
from galore_fx.installation import install
from galore_fx.optimizer_build import build_optimizer
from galore_fx.optimizer_choice import OptimizerChoice
from galore_fx.passes.model_graph.head_compiler import HeadCompiler
from galore_fx.passes.model_graph.region_compiler import RegionCompiler
from galore_fx.plan_record import Plan
from galore_fx.planned_batch import PlannedBatch
from galore_fx.recipe import Recipe
from galore_fx.request import Request


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
    **overrides: Any,
) -> Plan:
    """What ``compile`` would do to the model, from shapes alone; changes nothing.

    Takes what ``compile`` takes, and raises what it raises, with one exception: a budget that cannot hold the training
    is said by ``Plan.fits``. With a sample a whole step is simulated and its peak is in the plan; a budget then chooses
    what is left open: the share of activations that is kept, the update mode, the rank of recipe "auto".

    Args:
        device: "cpu" or "cuda", where it is to be trained; the model's by default, "cuda" for one on the meta device.
    """
    request = Request(budget, sample, recipe, optimizer, overrides, keep_logits, micro_batches, device)
    return (decide(model, request) if sample is None else decide_for_sample(model, request)).plan


def compile(  # noqa: A001 - the name users know from torch.compile
    model: nn.Module,
    budget: str | int | None = None,
    *,
    sample: object = None,
    recipe: str | Recipe = "auto",
    optimizer: OptimizerChoice = torch.optim.AdamW,
    keep_logits: bool = False,
    micro_batches: int = 1,
    strict: bool = False,
    **overrides: Any,
) -> nn.Module:
    """Compiles a model in place so that all its parameters train in little memory.

    Args:
        model: the model, on the device and in the dtype it will train in.
        budget: bytes the training may take, ``"16GB"``, ``"15.5GiB"`` or an int; None for no check.
        sample: a batch as the model takes it, of the shapes it will be trained with; checked on fake tensors before
            anything changes. With a budget, a step of it is simulated and the plan is chosen so that its peak fits.
        recipe: ``"auto"``, ``"galore"`` or ``"full"``, or a ``Recipe``.
        optimizer: a ``torch.optim`` class, a ``functools.partial`` of one (``partial(AdamW, lr=1e-3)``), or an
            instance over the model's parameters, which then refuses its own ``step()``.
        keep_logits: return ``outputs.logits`` in training too. Without it they are None where the model computes its
            loss from them by plain cross-entropy: the logits then never exist as a whole.
        micro_batches: backwards per ``step()`` that the budget is planned for; gradients live through the next one.
        strict: raise where a block cannot be captured as one graph, instead of training it uncompiled with a warning.
        **overrides: parts of the recipe: ``rank=128``, ``refresh_gap=200``, ``update="in-backward"``, ...

    Returns:
        The same module. ``model.galore_fx`` has ``.optimizer`` (step it), ``.plan`` and ``.stats()``.

    Raises:
        SettingError: an unknown recipe or override, a value that is not allowed, or a mode of torch's that is not
            supported (compiled autograd, CUDA graphs).
        ModelError: no linear layer to project, a sample the model does not accept, a model already compiled.
        OptimizerError: an optimizer over other parameters, or one whose step cannot be lowered.
        BudgetError: no plan fits the budget (with a sample), or what is kept through the step already exceeds it.
        All are raised before anything in the model is changed.
    """
    request = Request(budget, sample, recipe, optimizer, overrides, keep_logits, micro_batches)
    is_planned = sample is not None and budget is not None
    decisions = decide_for_sample(model, request) if is_planned else decide(model, request)
    built = build_optimizer(model, decisions, optimizer)
    compiler = RegionCompiler()
    head = None if keep_logits else HeadCompiler()
    planned = PlannedBatch(sample) if is_planned else None
    policy = decisions.plan.activation_policy
    blocks = install(model, decisions.regions, compiler, head, policy=policy, strict=strict, planned=planned)
    model.galore_fx = Compiled(built.optimizer, built.plan, compiler, built.updates, blocks)  # type: ignore[assignment]
    return model
