"""Pass over a model's modules: linear layers of the blocks become normalised ones with low-rank factors.

    before   q_proj: Linear(weight)
    after    q_proj: NormalizedLinear(base_weight frozen, magnitude, factor_out, factor_in)

requires  a plain model: no layer of it is normalised yet.
ensures   the model's function is what it was, bit for bit; the optimizer's groups hold the trained parts in the place
          of the weights. On leaving the context all is as before, unless ``keep`` has been called.

Left alone, and trained as other weights are: a weight that several modules share, and those of layers whose class is
neither ``nn.Linear`` nor ``Conv1D`` itself, since such a class may read its weight in its own way.
"""

import collections
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from galore_fx.passes.model_graph.find_regions import find_regions
from galore_fx.runtime.layers.normalized_linear import TRAINED, NormalizedLinear, normalize, restore

_SEED = 0


class Normalization:
    """The layers that are normalised now.

    Attributes:
        plain: of each layer the class and the parameters that it had.
    """

    def __init__(self) -> None:
        self.plain: dict[NormalizedLinear, tuple[type[nn.Module], dict[str, nn.Parameter | None]]] = {}

    def keep(self) -> None:
        """Makes it last. The weights of before are emptied: who still holds one would read what is not trained."""
        for _, parameters in self.plain.values():
            weight = parameters["weight"]
            assert weight is not None
            weight.data = weight.data.new_empty(0)
        self.plain.clear()


@contextmanager
def normalize_weights(
    model: nn.Module,
    groups: list[dict[str, Any]],
    *,
    rank: int | float,
    scale: float,
    by_column: bool,
) -> Iterator[Normalization]:
    """Normalises the layers of a model's blocks while the context lasts.

    Args:
        model: changed in place.
        groups: the param groups of an optimizer over the model's parameters, changed in place; none for a class.
        rank: of the factors; a fraction is of the weight's shorter side.
        scale: s.
        by_column: a norm for each column and not for each row.

    Raises:
        ModelError: the model has no trainable linear layer.
    """
    weights = {id(w.weight) for region in find_regions(model) for w in region.weights}
    users = collections.Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    generator = torch.Generator().manual_seed(_SEED)
    before = [{key: list(group[key]) for key in ("params", "param_names") if key in group} for group in groups]
    normalization = Normalization()
    try:
        for layer in list(model.modules()):
            weight = layer._parameters.get("weight")
            is_plain = type(layer) is nn.Linear or type(layer).__name__ == "Conv1D"
            if weight is None or not is_plain or id(weight) not in weights or users[id(weight)] > 1:
                continue
            wanted = round(rank * min(weight.shape)) if isinstance(rank, float) else rank
            plain = normalize(layer, max(1, min(wanted, *weight.shape)), scale, generator, by_column=by_column)
            assert isinstance(layer, NormalizedLinear)
            normalization.plain[layer] = plain
            for group in groups:
                _exchange(group, weight, layer)
        yield normalization
    finally:
        if normalization.plain:
            for group, lists in zip(groups, before, strict=True):
                for key, values in lists.items():
                    group[key][:] = values
        for made, plain in normalization.plain.items():
            restore(made, *plain)


def _exchange(group: dict[str, Any], weight: nn.Parameter, layer: NormalizedLinear) -> None:
    """The trained parts of a layer in its weight's place, and their names where the group has names."""
    found = [place for place, parameter in enumerate(group["params"]) if parameter is weight]
    for place in found:
        group["params"][place : place + 1] = [layer._parameters[name] for name in TRAINED]
        if "param_names" in group:
            owner = group["param_names"][place].removesuffix("weight")
            group["param_names"][place : place + 1] = [owner + name for name in TRAINED]
