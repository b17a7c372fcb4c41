"""Estimates the bytes and seconds that a block's refresh adds to a step; limits of the refresh queue bound their sums.

Only shapes are read, so every process of a training computes the same costs. Bytes are an upper bound: workspaces of
blocks that refresh together are added, though only one is alive at a time. Two things are missing in them: drawn heads,
known only once the graph is captured, keep up to one head's rows more than the rank; and rotated moments pass through
float32. Seconds assume a nominal rate and leave out the sketch's products, which grow with the batch. The peak of a
plan does not depend on these costs, since it is simulated. Each source of bases states its own cost
(runtime/subspace/basis_*.py).
"""

from collections.abc import Sequence

from galore_fx.passes.model_graph.find_regions import Region
from galore_fx.plan_record import ParameterPlan
from galore_fx.recipes.recipe import Recipe
from galore_fx.runtime.subspace.basis_source import WeightSize
from galore_fx.runtime.subspace.refresh_queue import RefreshCost
from galore_fx.runtime.subspace.sources import OF_RECIPE

# Nominal operations per second: two CPU cores, and float32 in the data sheet of an RTX 4090.
_RATES = {"cpu": 1e11, "cuda": 8.26e13}


def refresh_costs(
    regions: Sequence[Region], parameters: Sequence[ParameterPlan], recipe: Recipe
) -> dict[int, RefreshCost]:
    """Returns the refresh cost of each region with projected weights, by region index.

    Args:
        regions: regions of the model.
        parameters: plan of each parameter.
        recipe: the recipe in force.
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
