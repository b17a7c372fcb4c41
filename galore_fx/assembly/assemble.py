"""From decisions to a model that trains: stored weights, records and optimizer, compiled forwards.

The one place where decisions are acted on. ``compile`` calls it on the user's model, torch.compile's backend on one
whose forward it leaves alone, the simulator and ``explain`` on fake copies.
"""

import dataclasses

from torch import nn

from galore_fx.assembly.build_optimizer import build_optimizer
from galore_fx.assembly.decisions import Decisions
from galore_fx.assembly.install_forwards import InstalledBlocks, install
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
        head: rewrites head and loss; None to leave them.
        strict: whether a block that cannot be captured is an error.
    """

    head: HeadCompiler | None
    strict: bool = False


@dataclasses.dataclass(frozen=True)
class Assembled:
    """A model's compiled side.

    Attributes:
        decisions: about the model as it is now, its stored weights included.
        optimizer: steps the model.
        compiler: compiles the blocks.
        blocks: the installed forwards; None where the model's own were left.
    """

    decisions: Decisions
    optimizer: SubspaceOptimizer
    compiler: RegionCompiler
    blocks: InstalledBlocks | None

    @property
    def installed(self) -> InstalledBlocks:
        """The installed forwards, where there are any."""
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
    """Acts on decisions; changes the model in place.

    Args:
        model: the model that the decisions are about.
        decisions: all that has been checked and chosen.
        given: the optimizer as the user gave it; an instance refuses its own ``step()`` from then on.
        compiler: compiles the graphs of the blocks.
        forwards: how blocks, head and loss are compiled; None to leave every forward as it is.
        trained_with: the recipe that the optimizer trains with; that of the decisions by default.

    Raises:
        BudgetError: what is kept through the step already exceeds the budget; nothing has changed then.
    """
    decisions = quantize_weights(model, decisions)
    trained = decisions if trained_with is None else dataclasses.replace(decisions, recipe=trained_with)
    optimizer = build_optimizer(model, trained, given)
    blocks = None
    if forwards is not None:
        policy = decisions.plan.activation_policy
        blocks = install(model, decisions.regions, compiler, forwards.head, policy=policy, strict=forwards.strict)
    return Assembled(decisions, optimizer, compiler, blocks)
