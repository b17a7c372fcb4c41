"""Puts the weights that a plan stores in 8 bits in the place of the model's own, and takes them out again."""

import dataclasses
from typing import Any

from torch import nn

from galore_fx.assembly.decisions import Decisions
from galore_fx.runtime.formats.quantized_tensor import QuantizedTensor, plain_tensors
from galore_fx.runtime.layers.normalized_linear import NormalizedLinear, with_merged_weights


def quantize_weights(model: nn.Module, decisions: Decisions) -> Decisions:
    """Replaces parameters of the model, one after the other, in its modules and in the optimizer's groups.

    Of normalised layers it is the frozen weight that is stored so.

    The old ones are emptied, since whoever still holds one would otherwise keep the wide form of the weight alive.

    Returns:
        The decisions about the model as it is now.
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
    """The model's ``state_dict`` with ordinary tensors: where weights are stored in 8 bits (on the CPU) or normalised.

    For a model that galore_fx has not compiled. ``model.state_dict()`` has the codes themselves, from which a run goes
    on in the same bits. ``model.save_pretrained`` of transformers writes the ordinary ones.
    """
    return plain_tensors(with_merged_weights(model, model.state_dict()))


def _replace(model: nn.Module, groups: list[dict[str, Any]], old: nn.Parameter, new: nn.Parameter) -> None:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[name] = new
    for group in groups:
        group["params"][:] = [new if parameter is old else parameter for parameter in group["params"]]
