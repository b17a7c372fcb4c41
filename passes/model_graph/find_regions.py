"""Which parts of a model are compiled as one graph each, and which of their weights are projected.

A region is an entry of an outermost ``nn.ModuleList`` that holds linear layers: a decoder or encoder block. Where a
model has none, the whole model is the one region. Embeddings, heads, norms and biases are trained at full rank, as
in GaLore's released training script (methods: every linear of attention and MLP is projected).
"""

import dataclasses

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from galore_fx.errors import ModelError


@dataclasses.dataclass(frozen=True)
class LinearWeight:
    """A weight of a linear layer inside a region.

    Attributes:
        name: qualified name of the parameter in the model.
        weight: the parameter, 2-D.
        in_first: whether its first dimension is the layer's input (transformers' Conv1D).
    """

    name: str
    weight: nn.Parameter
    in_first: bool


@dataclasses.dataclass(frozen=True)
class Region:
    """A part of the model that is compiled as one graph.

    Attributes:
        name: qualified name of the module, "" for the whole model.
        module: the module whose forward is captured.
        weights: its linear weights that are trained, each once in the whole model.
    """

    name: str
    module: nn.Module
    weights: tuple[LinearWeight, ...]


def find_regions(model: nn.Module) -> list[Region]:
    """The regions of a model, in the order in which its modules are registered.

    Raises:
        ModelError: the model has no trainable linear layer at all.
    """
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    claimed: set[int] = set(embedded)
    regions = []
    for name, module in _blocks(model):
        weights = _linear_weights(name, module, claimed)
        if weights:
            regions.append(Region(name, module, weights))
    if not regions:
        weights = _linear_weights("", model, claimed)
        if not weights:
            raise ModelError(
                f"{type(model).__name__} has no trainable linear layer (nn.Linear or transformers' Conv1D); "
                "there is nothing to project. Train it with its optimizer as it is"
            )
        regions.append(Region("", model, weights))
    return regions


def _blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    blocks: list[tuple[str, nn.Module]] = []
    inside: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(prefix) for prefix in inside):
            continue
        inside.append(f"{name}.")
        blocks += _entries(name, module)
    return blocks


def _entries(name: str, container: nn.ModuleList) -> list[tuple[str, nn.Module]]:
    """The modules of a list that are called; a list inside it is not."""
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
        # nn.MultiheadAttention hands its output layer's weight to a function of its own and never calls the layer.
        if not (isinstance(child, nn.Linear) or in_first) or isinstance(child, NonDynamicallyQuantizableLinear):
            continue
        weight = child.weight
        usable = isinstance(weight, nn.Parameter) and weight.ndim == 2 and weight.is_floating_point()
        if usable and weight.requires_grad and id(weight) not in claimed:
            claimed.add(id(weight))
            found.append(LinearWeight(f"{name}.weight" if name else "weight", weight, in_first))
    return tuple(found)
