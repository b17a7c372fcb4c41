"""Applies decisions to a model: stored weights, records and optimizer, compiled forwards.

This is the only place that applies decisions. ``compile`` calls it on the user's model, the torch.compile backend on a
model whose forwards stay, the simulator and ``explain`` on fake copies.
"""

import dataclasses

from torch import nn

from galore_fx.assembly.build_optimizer import build_optimizer
from galore_fx.assembly.decisions import Decisions
from galore_fx.assembly.install_forwards import InstalledBlocks, install
from galore_fx.assembly.plan_parameters import check_budget
from galore_fx.assembly.quantize_weights import quantize_weights
from galore_fx.assembly.user_optimizer import OptimizerChoice
from galore_fx.passes.model_graph.head_compiler import HeadCompiler
from galore_fx.passes.model_graph.region_compiler import RegionCompiler
from galore_fx.recipes.recipe import Recipe
from galore_fx.runtime.step.subspace_optimizer import SubspaceOptimizer


@dataclasses.dataclass(frozen=True)
class Forwards:
    """How the forwards of a model are compiled.

    Attributes:
        head: compiler that rewrites head and loss; None leaves them unchanged.
        strict: whether a block that cannot be captured raises CaptureError.
    """

    head: HeadCompiler | None
    strict: bool = False


@dataclasses.dataclass(frozen=True)
class Assembled:
    """The objects that train one model.

    Attributes:
        decisions: decisions for the current model, including its stored weights.
        optimizer: optimizer that steps the model.
        compiler: compiler of the blocks.
        blocks: installed forwards; None if the model keeps its own.
    """

    decisions: Decisions
    optimizer: SubspaceOptimizer
    compiler: RegionCompiler
    blocks: InstalledBlocks | None

    @property
    def installed(self) -> InstalledBlocks:
        """The installed forwards; an AssertionError if there are none."""
        assert self.blocks is not None
        return self.blocks


def assemble(
    model: nn.Module,
    decisions: Decisions,
    given: OptimizerChoice,
    compiler: RegionCompiler,
    forwards: Forwards | None,
    *,
    trained_with: Recipe | None = None,
) -> Assembled:
    """Applies decisions to a model in place.

    Args:
        model: model that the decisions are for.
        decisions: the outcome of all checks and choices.
        given: the user's optimizer argument; an instance refuses its own ``step()`` afterwards.
        compiler: compiler of the blocks' graphs.
        forwards: how blocks, head and loss are compiled; None leaves every forward unchanged.
        trained_with: recipe of the optimizer; by default the recipe of the decisions.

    Raises:
        BudgetError: the plan exceeds its budget; nothing has changed then.
    """
    check_budget(decisions.plan)
    decisions = quantize_weights(model, decisions)
    trained = decisions if trained_with is None else dataclasses.replace(decisions, recipe=trained_with)
    optimizer = build_optimizer(model, trained, given)
    blocks = None
    if forwards is not None:
        policy = decisions.plan.activation_policy
        blocks = install(model, decisions.regions, compiler, forwards.head, policy=policy, strict=forwards.strict)
    return Assembled(decisions, optimizer, compiler, blocks)
