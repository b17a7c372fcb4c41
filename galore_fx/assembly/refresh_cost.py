"""What renewing a block's bases adds to a step, in bytes and seconds: by what the queue of refreshes is limited.

From shapes alone, so that every process of a training finds the same; bytes are an upper bound (workspaces of blocks
that refresh together are added up, though one is alive at a time) but for two things: heads that are drawn, which the
graph shows later, keep up to a head's rows more than the rank, and rotated moments pass by in float32. Seconds are at a
nominal rate, and without the products of the sketch, which grow with the batch. The peak of a plan does not hang on
these costs: it is simulated.

                         kept until the update      workspace, float32     operations
    svd                  G (m, n)                   G, U, S, V             14 m n^2 + 8 n^3, n the shorter side
    subspace iteration   sketch (size, r + p)       three such             9 size (r + p)^2
    random               nothing                    one such               4 size r^2

Source: Golub, Van Loan, Matrix Computations, 4th edition, figure 8.6.1 (R-SVD with thin U); three passes of Cholesky QR
at 2 size r^2 for the Gram matrix and size r^2 for the triangular solve.
"""

from collections.abc import Sequence

from galore_fx.passes.model_graph.find_regions import Region
from galore_fx.plan_record import ParameterPlan
from galore_fx.recipes.recipe import Recipe
from galore_fx.runtime.subspace.refresh_queue import RefreshCost

# Nominal: two CPU cores, and the float32 rate of an RTX 4090's data sheet.
_RATES = {"cpu": 1e11, "cuda": 8.26e13}
_WIDE_BYTES = 4


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
        held, passing, work = _cost(entry, recipe, linear.weight.element_size(), is_small=linear.is_factor)
        kept[entry.region] = kept.get(entry.region, 0) + held
        workspace[entry.region] = max(workspace.get(entry.region, 0), passing)
        operations[entry.region] = operations.get(entry.region, 0.0) + work
    return {key: RefreshCost(held + workspace[key], operations[key] / rate) for key, held in kept.items()}


def _cost(entry: ParameterPlan, recipe: Recipe, element: int, *, is_small: bool) -> tuple[int, int, float]:
    """Bytes kept, bytes of workspace, operations of one weight."""
    assert entry.rank is not None
    m, n = entry.shape
    if recipe.basis == "svd":
        long, short = max(m, n), min(m, n)
        whole = 0 if is_small else m * n * element  # a factor's gradient comes in full anyway
        passing = _WIDE_BYTES * (2 * m * n + short * (short + 1))
        if recipe.residual == "scaled":  # formed for itself, in the backward
            whole, passing = 0, passing + whole
        return whole, passing, 14.0 * long * short**2 + 8.0 * short**3
    size = m if entry.dim == "rows" else n
    if recipe.basis == "random":
        parts = recipe.granularity_in_force((size, entry.rank))
        size, rank = size // parts, entry.rank // parts
        return 0, _WIDE_BYTES * size * rank, 4.0 * size * rank**2
    columns = min(entry.rank + recipe.oversampling, size)
    return size * columns * element, 3 * _WIDE_BYTES * size * columns, 9.0 * size * columns**2
