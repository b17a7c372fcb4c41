"""What renewing a block's bases adds to a step, in bytes and seconds: by what the queue of refreshes is limited.

From shapes alone, so that every process of a training finds the same; bytes are an upper bound (workspaces of blocks
that refresh together are added up, though one is alive at a time) but for two things: heads that are drawn, which the
graph shows later, keep up to a head's rows more than the rank, and rotated moments pass by in float32. Seconds are at a
nominal rate, and without the products of the sketch, which grow with the batch. The peak of a plan does not hang on
these costs: it is simulated. What a source of bases takes is said by the source (runtime/subspace/basis_*.py).
"""

from collections.abc import Sequence

from galore_fx.passes.model_graph.find_regions import Region
from galore_fx.plan_record import ParameterPlan
from galore_fx.recipes.recipe import Recipe
from galore_fx.runtime.subspace.basis_source import WeightSize
from galore_fx.runtime.subspace.refresh_queue import RefreshCost
from galore_fx.runtime.subspace.sources import OF_RECIPE

# Nominal: two CPU cores, and the float32 rate of an RTX 4090's data sheet.
_RATES = {"cpu": 1e11, "cuda": 8.26e13}


def refresh_costs(
    regions: Sequence[Region], parameters: Sequence[ParameterPlan], recipe: Recipe
) -> dict[int, RefreshCost]:
    """The cost of each region's refresh, by its index.

    Args:
        regions: of the model.
        parameters: what is decided about its parameters.
        recipe: the parts in force.
    """
    weights = {w.name: w for region in regions for w in region.weights}
    kept: dict[int, int] = {}
    workspace: dict[int, int] = {}
    operations: dict[int, float] = {}
    rate = _RATES["cpu"]
    for entry in parameters:
        if entry.region is None or entry.rank is None:
            continue
        linear = weights[entry.name]
        rate = _RATES.get(linear.weight.device.type, rate)
        shape = (entry.shape[0], entry.shape[1])
        size = shape[0] if entry.dim == "rows" else shape[1]
        weight = WeightSize(shape, size, entry.rank, linear.weight.element_size(), linear.is_factor)
        work = OF_RECIPE[recipe.basis].cost(weight, recipe)
        kept[entry.region] = kept.get(entry.region, 0) + work.kept_bytes
        workspace[entry.region] = max(workspace.get(entry.region, 0), work.workspace_bytes)
        operations[entry.region] = operations.get(entry.region, 0.0) + work.operations
    return {key: RefreshCost(held + workspace[key], operations[key] / rate) for key, held in kept.items()}
