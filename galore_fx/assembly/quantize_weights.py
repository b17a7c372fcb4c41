"""Stores the planned weights of a model as 8-bit codes, and exports them as plain tensors."""

import dataclasses
from typing import Any

from torch import nn

from galore_fx.assembly.decisions import Decisions
from galore_fx.runtime.formats.quantized_tensor import QuantizedTensor, plain_tensors
from galore_fx.runtime.layers.normalized_linear import NormalizedLinear, with_merged_weights


def quantize_weights(model: nn.Module, decisions: Decisions) -> Decisions:
    """Replaces parameters by quantised ones, one by one, in the modules and in the optimizer's groups.

    In a normalised layer the frozen weight is quantised. The replaced parameters are emptied; a remaining reference to
    one would otherwise keep the unquantised weight alive.

    Returns:
        The decisions with the new parameters in their regions.
    """
    if decisions.recipe.weight_norm is not None and decisions.recipe.weight_bits is not None:
        for module in model.modules():
            if isinstance(module, NormalizedLinear):
                module.store_base_(decisions.recipe.weight_bits)
    bits = {entry.name: entry.weight_bits for entry in decisions.plan.parameters}
    regions = []
    for region in decisions.regions:
        weights = []
        for linear in region.weights:
            num_bits = bits.get(linear.name)
            if num_bits is not None and not isinstance(linear.weight, QuantizedTensor):
                new = nn.Parameter(QuantizedTensor.of(linear.weight.detach(), num_bits))
                _replace(model, decisions.optimizer.param_groups, linear.weight, new)
                linear.weight.data = linear.weight.data.new_empty(0)
                linear = dataclasses.replace(linear, weight=new)
            weights.append(linear)
        regions.append(dataclasses.replace(region, weights=tuple(weights)))
    return dataclasses.replace(decisions, regions=regions)


def plain_state_dict(model: nn.Module) -> dict[str, Any]:
    """Returns the model's ``state_dict`` with plain tensors, for loading into a model without galore_fx.

    Weights stored in 8 bits are dequantised on the CPU; each normalised layer is merged into one weight.
    ``model.state_dict()`` keeps the codes, from which a run resumes bit-identically. transformers'
    ``model.save_pretrained`` writes the plain tensors too.
    """
    return plain_tensors(with_merged_weights(model, model.state_dict()))


def _replace(model: nn.Module, groups: list[dict[str, Any]], old: nn.Parameter, new: nn.Parameter) -> None:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[name] = new
    for group in groups:
        group["params"][:] = [new if parameter is old else parameter for parameter in group["params"]]
