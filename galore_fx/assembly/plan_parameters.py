"""Decides whether and how each parameter is projected, and counts the resulting bytes.

Only shapes and dtypes are read, so parameters may be on the meta device.
"""

import functools
import math
from collections.abc import Mapping, Sequence

from torch import nn

from galore_fx.errors import BudgetError
from galore_fx.passes.model_graph.find_regions import LinearWeight, Region
from galore_fx.passes.model_graph.parameter_roles import ParameterRole
from galore_fx.plan_record import ParameterPlan, Plan
from galore_fx.recipes.recipe import Recipe
from galore_fx.runtime.formats.groupwise import stored_bytes
from galore_fx.runtime.formats.quantized_tensor import QuantizedTensor
from galore_fx.runtime.formats.state_format import StateFormat
from galore_fx.runtime.layers.normalized_linear import NormalizedLinear, is_storable
from galore_fx.runtime.remainder.sparse import num_blocks, num_entries
from galore_fx.runtime.subspace.projection import ProjectedDim
from galore_fx.units import format_bytes

_SCALAR_STATE_BYTES = _NORM_BYTES = 4
# Of an int32 column index of a sparse residual.
_COLUMN_BYTES = 4


def plan_parameters(
    named_parameters: Sequence[tuple[str, nn.Parameter]],
    regions: Sequence[Region],
    roles: Mapping[str, ParameterRole],
    recipe: Recipe,
    *,
    optimizer: str,
    num_state_tensors: int,
    state_format: StateFormat,
    num_state_scalars: int,
    budget_bytes: int | None,
    fixed_bytes: int,
) -> Plan:
    """Returns the plan of a model under a recipe, without a prediction.

    Args:
        named_parameters: trained parameters with their names, each once.
        regions: regions of the model.
        roles: role of each parameter in the model, by name.
        recipe: the recipe in force.
        optimizer: name of the optimizer class.
        num_state_tensors: state tensors of the gradient's shape per parameter.
        state_format: storage format of these tensors.
        num_state_scalars: float32 state scalars per parameter.
        budget_bytes: the budget; None without one.
        fixed_bytes: bytes of frozen parameters and buffers.
    """
    projected = {id(w.weight): (index, w) for index, region in enumerate(regions) for w in region.weights}
    entries = []
    for name, parameter in named_parameters:
        index, linear = projected.get(id(parameter), (None, None)) if recipe.projects else (None, None)
        element, role = parameter.element_size(), roles[name]
        weight_bytes = parameter.numel() * element
        scalar_bytes = num_state_scalars * _SCALAR_STATE_BYTES
        if linear is None:
            state_bytes = (
                num_state_tensors * state_format.stored_bytes(parameter.numel(), parameter.dtype) + scalar_bytes
            )
            sizes = {
                "weights": 0 if role.is_factor else weight_bytes,
                "factors": weight_bytes if role.is_factor else 0,
                "bases": 0,
                "optimizer_state": state_bytes,
                "residuals": 0,
                "gradients": weight_bytes,
            }
            reason = role.description if recipe.projects else f"recipe {recipe.name} projects nothing"
            full = ParameterPlan(name, tuple(parameter.shape), None, None, None, sizes, reason, role.shared_with)
            entries.append(full)
            continue
        shape = (parameter.shape[0], parameter.shape[1])
        dim, rank = projected_dim(linear, recipe), recipe.rank_in_force(shape)
        if linear.is_factor:
            rank = min(shape)
        is_two_sided = linear.is_factor and recipe.sides == "two"
        state_size = functools.partial(state_format.stored_bytes, weight_dtype=parameter.dtype)
        low = rank * rank if is_two_sided else math.prod(dim.projected_shape(shape, rank))
        weight_bits = recipe.weight_bits if is_storable(parameter) and not linear.is_factor else None
        num_slots = num_entries(recipe.residual_density, shape[1]) if recipe.residual == "sparse" else 0
        sparse = shape[0] * num_slots
        entry_states = num_state_tensors * state_size(sparse) + scalar_bytes
        if recipe.residual_variant == "scaled":
            entry_states = _NORM_BYTES
        direction = low * element if recipe.refresh == "lotus" else 0
        is_scaled = recipe.residual == "scaled"
        basis_elements = rank * sum(shape) if is_two_sided else math.prod(basis_shape(shape, dim, rank, recipe))
        stored = _stored_bytes(parameter.numel(), weight_bits, element)
        sizes = {
            "weights": 0 if linear.is_factor else stored,
            "factors": stored if linear.is_factor else 0,
            "bases": _stored_bytes(basis_elements, recipe.basis_bits, element),
            "optimizer_state": num_state_tensors * state_size(low) + scalar_bytes + direction,
            "residuals": num_slots * num_blocks(shape[0]) * _COLUMN_BYTES + entry_states
            if sparse
            else _NORM_BYTES * is_scaled,
            "gradients": (low + sparse + linear.is_factor * parameter.numel()) * element,
        }
        about = (role.description, role.shared_with, weight_bits)
        entries.append(ParameterPlan(name, shape, index, dim.value, rank, sizes, *about))
    names = tuple(region.name for region in regions)
    policy = (recipe.activation_budget,) * len(regions)
    return Plan(recipe, optimizer, budget_bytes, names, tuple(entries), fixed_bytes, policy)


def fixed_bytes(model: nn.Module, recipe: Recipe) -> int:
    """Returns bytes of buffers and frozen parameters; normalised layers' weights count as the recipe stores them."""
    layers = [module for module in model.modules() if isinstance(module, NormalizedLinear)]
    stored = {id(layer.base_weight) for layer in layers if is_storable(layer.base_weight)}
    total = sum(b.nbytes for b in model.buffers())
    for parameter in model.parameters():
        if isinstance(parameter, QuantizedTensor) and not parameter.requires_grad:
            total += sum(part.nbytes for part in parameter.parts)
        elif not parameter.requires_grad:
            bits = recipe.weight_bits if id(parameter) in stored else None
            total += _stored_bytes(parameter.numel(), bits, parameter.element_size())
    return total


def _stored_bytes(num_elements: int, bits: int | None, element: int) -> int:
    return num_elements * element if bits is None else stored_bytes(num_elements, bits)


def basis_shape(shape: tuple[int, int], dim: ProjectedDim, rank: int, recipe: Recipe) -> tuple[int, int]:
    """Returns the shape of a weight's stored basis: (size, rank), both divided by the granularity in force."""
    return dim.basis_shape(shape, rank, recipe.granularity_in_force(dim.basis_shape(shape, rank)))


def projected_dim(linear: LinearWeight, recipe: Recipe) -> ProjectedDim:
    """Returns the dimension of the weight that shrinks; for equal sides the columns, as in the reference (m >= n)."""
    rows, cols = linear.weight.shape
    if linear.is_factor and recipe.sides == "two":
        return ProjectedDim.ROWS  # the columns shrink too
    if recipe.project == "shorter" or linear.is_factor:
        return ProjectedDim.COLS if rows >= cols else ProjectedDim.ROWS
    input_is_rows = linear.in_first
    return ProjectedDim.ROWS if (recipe.project == "input") == input_is_rows else ProjectedDim.COLS


def check_budget(plan: Plan) -> None:
    """Checks a plan against its budget.

    Raises:
        BudgetError: the predicted peak exceeds the budget; without a prediction, the bytes kept through the step do.
            The message gives the required bytes by category.
    """
    if plan.within_budget:
        return
    assert plan.budget_bytes is not None
    if plan.prediction is not None:
        parts = sorted(plan.categories.items(), key=lambda item: -item[1])
        formed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts if size)
        how = f" with {'; '.join(plan.chosen)}" if plan.chosen else ""
        raise BudgetError(
            f"the budget of {format_bytes(plan.budget_bytes)} cannot hold this training. The smallest plan needs "
            f"{format_bytes(plan.peak_bytes)}{how}: {formed}. Give that budget; or change what would fit: "
            f"{'; '.join(plan.nearest) or 'a smaller model'}"
        )
    largest = ", ".join(f"{name} {format_bytes(size)}" for name, size in plan.categories.items())
    raise BudgetError(
        f"the budget of {format_bytes(plan.budget_bytes)} cannot hold this training: {largest} are kept through "
        f"the whole step, {format_bytes(plan.peak_bytes)} before any activation. Lower rank "
        f"(now {plan.recipe.rank}), use a lower-precision model (model.bfloat16()), or raise the budget"
    )
