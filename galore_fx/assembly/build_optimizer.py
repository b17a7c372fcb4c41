"""Creates the records of the projected parameters and the optimizer, as decided."""

import torch
from torch import nn

from galore_fx.assembly.decisions import Decisions, refresh_limits
from galore_fx.assembly.plan_parameters import basis_shape, check_budget
from galore_fx.assembly.refresh_cost import refresh_costs
from galore_fx.assembly.user_optimizer import OptimizerChoice, retire
from galore_fx.recipes.recipe import Recipe
from galore_fx.runtime.dispatch.forwards import ClearingZeroGrad, FixedPlace, PlainSave
from galore_fx.runtime.formats.quantized_tensor import QuantizedTensor
from galore_fx.runtime.layers.merge_factors import FactorMerge
from galore_fx.runtime.layers.normalized_linear import NormalizedLinear, trained_parts
from galore_fx.runtime.remainder.sparse import SparseResidual
from galore_fx.runtime.step.late_parameters import parameters_of
from galore_fx.runtime.step.subspace_optimizer import SubspaceOptimizer
from galore_fx.runtime.subspace.bases import random_basis
from galore_fx.runtime.subspace.basis_svd import ExactBases
from galore_fx.runtime.subspace.projected_parameter import REGISTRY, ProjectedParameter
from galore_fx.runtime.subspace.projection import ProjectedDim
from galore_fx.runtime.subspace.refresh_criteria import Displacement, LazyGaps, RefreshCriterion
from galore_fx.runtime.subspace.refresh_queue import SUBSPACE_ITERATION_WARM_UP, FixedSchedule
from galore_fx.runtime.subspace.sources import OF_RECIPE

_SEED = 0


def build_optimizer(model: nn.Module, decisions: Decisions, given: OptimizerChoice) -> SubspaceOptimizer:
    """Returns the optimizer that replaces the user's, with its state.

    On the model it replaces ``zero_grad``, which then clears projected gradients too, ``_apply``, which refuses to move
    or cast parameters, and, where weights are quantised or normalised, ``save_pretrained``, which writes plain weights.

    Raises:
        BudgetError: the plan exceeds its budget; nothing has changed then.
    """
    check_budget(decisions.plan)
    records, layers = make_records(decisions)
    optimizer = _make_optimizer(model, decisions, records, layers)
    if decisions.optimizer is given:
        retire(decisions.optimizer)
    model._apply = FixedPlace(model)  # type: ignore[method-assign]
    model.zero_grad = ClearingZeroGrad(model, optimizer.zero_grad)  # type: ignore[method-assign]
    is_plain = not trained_parts(model) and not any(isinstance(p, QuantizedTensor) for p in model.parameters())
    if hasattr(model, PlainSave.method) and not is_plain:
        model.save_pretrained = PlainSave(model)  # type: ignore[assignment]
    return optimizer


def make_records(decisions: Decisions) -> tuple[list[ProjectedParameter], list[int]]:
    """Creates one record per projected parameter and registers it under its weight.

    Returns:
        The records, and for each the index of its region.
    """
    linears = {w.name: w for region in decisions.regions for w in region.weights}
    generator = torch.Generator().manual_seed(_SEED)
    recipe = decisions.recipe
    source_class = OF_RECIPE[recipe.basis]
    records: list[ProjectedParameter] = []
    layers = []
    for entry in decisions.plan.parameters:
        if entry.rank is None or entry.dim is None or entry.region is None:
            continue
        linear, dim = linears[entry.name], ProjectedDim(entry.dim)
        weight = linear.weight
        shape = basis_shape((entry.shape[0], entry.shape[1]), dim, entry.rank, recipe)
        basis = source_class.first_basis(shape, generator).to(weight.device, weight.dtype)
        if recipe.basis_bits is not None:
            basis = QuantizedTensor.of(basis, recipe.basis_bits)
        source = source_class.create(weight, basis, recipe)
        right = None
        if linear.is_factor and recipe.sides == "two":
            right = random_basis((entry.shape[1], entry.rank), generator).to(weight.device, weight.dtype)
            source = ExactBases(weight, shape, right)
        record = ProjectedParameter.create(entry.name, weight, dim, entry.rank, basis, source)
        words = frozenset((recipe.cross_head or "").split("-"))
        record.shared_roles, record.shares_basis = words - {"", "shared"}, "shared" in words
        if linear.is_factor:
            record.delivers_full = True
            if right is not None:
                record.project_both_sides(right)
        if recipe.refresh == "lotus":
            record.first_direction = torch.zeros(record.leaf.shape, dtype=record.leaf.dtype, device=weight.device)
        if recipe.residual == "scaled":
            record.complement_norm, record.consumes = torch.zeros((), device=weight.device), True
        if recipe.residual == "sparse":
            record.residual = SparseResidual.create(
                weight,
                recipe.residual_density,
                variant=recipe.residual_variant,
                warm_up=recipe.residual_warm_up,
            )
        REGISTRY.add(record)
        records.append(record)
        layers.append(entry.region)
    return records, layers


def _make_optimizer(
    model: nn.Module, decisions: Decisions, records: list[ProjectedParameter], layers: list[int]
) -> SubspaceOptimizer:
    recipe = decisions.recipe
    # In the first update factor_out is zero, and with it the gradient of factor_in.
    is_second_first = recipe.basis == "subspace-iteration" or recipe.weight_norm is not None
    num_initial = max(SUBSPACE_ITERATION_WARM_UP if is_second_first else 1, recipe.iterations)
    # A merge sets factor_out to zero again.
    num_iterations = SUBSPACE_ITERATION_WARM_UP if recipe.merge_factors else recipe.iterations
    schedule = FixedSchedule(recipe.refresh_gap, len(decisions.regions), recipe.stagger, num_initial, num_iterations)
    return SubspaceOptimizer(
        decisions.optimizer.param_groups,
        decisions.optimizer.defaults,
        updates=decisions.updates,
        records=records,
        layers=layers,
        schedule=schedule,
        criterion=_criterion(recipe),
        by_first_vector=recipe.lazy_statistic == "first-vector",
        limits=refresh_limits(recipe),
        costs=refresh_costs(decisions.regions, decisions.plan.parameters, recipe),
        moments_on_refresh=recipe.moments_on_refresh,
        scale=recipe.scale,
        in_backward=recipe.update == "in-backward",
        max_grad_norm=recipe.max_grad_norm,
        named=parameters_of(model),
        rounding_seed=_SEED if recipe.rounding == "stochastic" else None,
        merge=FactorMerge(_normalized_layers(decisions), recipe.refresh_gap) if recipe.merge_factors else None,
    )


def _normalized_layers(decisions: Decisions) -> list[NormalizedLinear]:
    return [m for region in decisions.regions for m in region.module.modules() if isinstance(m, NormalizedLinear)]


def _criterion(recipe: Recipe) -> RefreshCriterion:
    if recipe.refresh == "lazy":
        return LazyGaps(recipe.refresh_gap, recipe.lazy_threshold, recipe.lazy_queue, recipe.lazy_limit)
    if recipe.refresh == "lotus":
        return Displacement(recipe.lotus_threshold, recipe.lotus_interval)
    return RefreshCriterion()
