"""Selects the parts of a model that are compiled as one graph each, and their projected weights.

A region is an entry of an outermost ``nn.ModuleList`` that contains linear layers: a decoder or encoder block. A model
without such entries is one region as a whole. Embeddings, heads, norms and biases are trained at full rank, as in
GaLore's released training script (methods: every linear of attention and MLP is projected).

A head differs from a block in its widths. Its linear layers form a chain in which each takes the output of the previous
one, and no linear layer of the model has the output width of the last one as its input width. A list entry that ends in
classes, coordinates or tokens is thus no block, in any list. An entry with branches, such as an attention or a gate, is
a block, as is one that returns to its first width and is no ``nn.Sequential``.
"""

import dataclasses
import itertools
from collections.abc import Sequence

from torch import nn

from galore_fx.errors import ModelError
from galore_fx.runtime.layers.normalized_linear import FACTORS, NormalizedLinear

_ATTENTION_KEYS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclasses.dataclass(frozen=True)
class LinearWeight:
    """A weight of a linear layer inside a region.

    Attributes:
        name: qualified name of the parameter in the model.
        weight: the parameter, 2-D.
        in_first: whether the first dimension is the input of the layer (transformers' Conv1D).
        is_factor: whether the weight is a low-rank factor of a normalised layer.
    """

    name: str
    weight: nn.Parameter
    in_first: bool
    is_factor: bool = False


@dataclasses.dataclass(frozen=True)
class Region:
    """A part of the model that is compiled as one graph.

    Attributes:
        name: qualified name of the module, "" for the whole model.
        module: the module whose forward is captured.
        weights: trained linear weights of the module, without tied embeddings; a shared weight is in one region only.
    """

    name: str
    module: nn.Module
    weights: tuple[LinearWeight, ...]


def find_regions(model: nn.Module) -> list[Region]:
    """Returns the regions of a model, in the order in which its modules are registered.

    Raises:
        ModelError: the model has no trainable parameter or no trainable linear layer.
    """
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    claimed: set[int] = set(embedded)
    regions = []
    widths = _input_widths(model)
    for name, module in _blocks(model):
        if _is_head(module, widths):
            continue
        weights = _linear_weights(name, module, claimed)
        if weights:
            regions.append(Region(name, module, weights))
    if not regions:
        weights = _without_heads(model, _linear_weights("", model, claimed), widths)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ModelError(
                f"no parameter of this {type(model).__name__} has requires_grad=True; unfreeze what is to be trained"
            )
        if not weights:
            raise ModelError(
                f"{type(model).__name__} has no trainable linear layer (nn.Linear or transformers' Conv1D); "
                "there is nothing to project. Train it with its optimizer as it is"
            )
        regions.append(Region("", model, weights))
    return regions


def find_stems(model: nn.Module, regions: Sequence[Region]) -> list[nn.Module]:
    """Returns the modules that call the blocks: the owners of their lists, and a transformers model's base model.

    The rest of the model's forward is head and loss. The list is empty if the model itself calls its blocks.
    """
    modules = dict(model.named_modules())
    names = {_owner(region.name, modules) for region in regions}
    base = getattr(model, "base_model", None)
    if "" in names:
        return []
    whole = [name for name, module in modules.items() if name and module is base]
    names |= {name for name in whole if all(region.name.startswith(f"{name}.") for region in regions)}
    return [modules[name] for name in sorted(names)]


def _owner(name: str, modules: dict[str, nn.Module]) -> str:
    """Returns the name of the nearest ancestor of a block that is no list, "" for the model."""
    while name:
        name = name.rpartition(".")[0]
        if not isinstance(modules[name], nn.ModuleList):
            break
    return name


def _blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    blocks: list[tuple[str, nn.Module]] = []
    inside: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(prefix) for prefix in inside):
            continue
        inside.append(f"{name}.")
        blocks += _entries(name, module)
    return blocks


def _input_widths(model: nn.Module) -> set[int]:
    """Returns the input widths of a model's linear layers."""
    return {width for module in model.modules() for width, _ in _widths(module)}


def _is_head(module: nn.Module, widths: set[int]) -> bool:
    """Returns whether a module is a head, as the module docstring defines it."""
    chain = [each for part in module.modules() for each in _widths(part)]
    if not chain or chain[-1][1] in widths or any(a[1] != b[0] for a, b in itertools.pairwise(chain)):
        return False
    start, inner = chain[0][0], [out for _, out in chain[:-1]]
    comes_back = any(a != start and b == start for a, b in itertools.pairwise(inner))
    return isinstance(module, nn.Sequential) or not comes_back


def _without_heads(model: nn.Module, weights: tuple[LinearWeight, ...], widths: set[int]) -> tuple[LinearWeight, ...]:
    """Returns the weights of a model without blocks, except those in lists of heads; all of them if none remains."""
    heads = [module for _, module in _blocks(model) if _is_head(module, widths)]
    of_heads = {id(parameter) for head in heads for parameter in head.parameters()}
    return tuple(weight for weight in weights if id(weight.weight) not in of_heads) or weights


def _widths(module: nn.Module) -> list[tuple[int, int]]:
    """Returns (input width, output width) of a layer that multiplies by a weight, an empty list for other modules."""
    if isinstance(module, nn.Linear):
        return [(module.in_features, module.out_features)]
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        rows, cols = module.get_parameter("weight").shape
        return [(rows, cols)]
    if isinstance(module, NormalizedLinear):
        rows, cols = module.base_weight.shape
        return [(rows, cols) if module.in_first else (cols, rows)]
    if isinstance(module, nn.MultiheadAttention):
        return [(module.embed_dim, module.embed_dim)]
    return []


def _entries(name: str, container: nn.ModuleList) -> list[tuple[str, nn.Module]]:
    """Returns the callable entries of a list by name; a nested list is replaced by its entries."""
    found: list[tuple[str, nn.Module]] = []
    for key, child in container.named_children():
        if isinstance(child, nn.ModuleList):
            found += _entries(f"{name}.{key}", child)
        else:
            found.append((f"{name}.{key}", child))
    return found


def _linear_weights(prefix: str, module: nn.Module, claimed: set[int]) -> tuple[LinearWeight, ...]:
    found = []
    for name, child in module.named_modules(prefix=prefix):
        in_first = type(child).__name__ == "Conv1D" and hasattr(child, "nf")
        if isinstance(child, nn.Linear) or in_first:
            keys: tuple[str, ...] = ("weight",)
        elif isinstance(child, NormalizedLinear):
            keys = FACTORS
        else:
            # The input weights of nn.MultiheadAttention; its output layer is an nn.Linear.
            keys = _ATTENTION_KEYS if isinstance(child, nn.MultiheadAttention) else ()
        for key in keys:
            weight = getattr(child, key)
            usable = isinstance(weight, nn.Parameter) and weight.ndim == 2 and weight.is_floating_point()
            if usable and weight.requires_grad and id(weight) not in claimed:
                claimed.add(id(weight))
                found.append(LinearWeight(f"{name}.{key}" if name else key, weight, in_first, key in FACTORS))
    return tuple(found)
