"""Analysis: describes the role of each trained parameter, for the plan and for ``explain``."""

import dataclasses
from collections.abc import Sequence

from torch import nn

from galore_fx.passes.model_graph.find_regions import Region
from galore_fx.runtime.layers.normalized_linear import FACTORS, TRAINED, NormalizedLinear


@dataclasses.dataclass(frozen=True)
class ParameterRole:
    """The role of a parameter in its model.

    Attributes:
        description: "linear of a block", "embedding", ...; the reason why it can or cannot be projected.
        shared_with: other names of the parameter in the model, if several modules use it.
        is_factor: whether the parameter is a trained part of a normalised layer.
    """

    description: str
    shared_with: tuple[str, ...]
    is_factor: bool = False


def parameter_roles(model: nn.Module, regions: Sequence[Region]) -> dict[str, ParameterRole]:
    """Returns the role of each trained parameter, by its first name in the model."""
    in_blocks = {id(w.weight) for region in regions for w in region.weights}
    kinds: dict[int, set[str]] = {}
    names: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            kinds.setdefault(id(parameter), set()).add(_kind(module, key))
            names.setdefault(id(parameter), []).append(f"{prefix}.{key}" if prefix else key)
    roles = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        known = kinds[id(parameter)]
        others = tuple(other for other in names[id(parameter)] if other != name)
        is_factor = "factor" in known or "magnitude" in known
        if is_factor:
            description = "factor of a normalised layer" if "factor" in known else "magnitude of a normalised layer"
        elif id(parameter) in in_blocks:
            description = "linear of a block"
        elif parameter.ndim != 2:
            description = f"{parameter.ndim}-D, not a matrix"
        elif "embedding" in known:
            description = "embedding, tied to the head" if "linear" in known else "embedding"
        else:
            description = "linear outside the blocks" if "linear" in known else "not the weight of a linear layer"
        roles[name] = ParameterRole(description, others, is_factor)
    return roles


def _kind(module: nn.Module, key: str) -> str:
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, NormalizedLinear) and key in TRAINED:
        return "factor" if key in FACTORS else key
    conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    linear = isinstance(module, nn.Linear | nn.MultiheadAttention) or conv1d
    return "linear" if linear and key.endswith("weight") else "other"
