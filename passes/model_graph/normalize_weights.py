"""Pass over a model's modules: turns linear layers of the blocks into normalised ones with low-rank factors.

    before   q_proj: Linear(weight)
    after    q_proj: NormalizedLinear(base_weight frozen, magnitude, factor_out, factor_in)

requires  a model without normalised layers.
ensures   the model's function is bit-identical; the optimizer's groups hold the trained parts instead of the weights.
          Leaving the context restores everything, unless ``keep`` has been called.

Two kinds of weights are left unchanged and trained like other weights: a weight that several modules share, and the
weights of subclasses of ``nn.Linear`` and ``Conv1D``, which may read their weight in their own way.
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
    """The layers that are currently normalised.

    Attributes:
        plain: previous class and parameters of each layer.
    """

    def __init__(self) -> None:
        self.plain: dict[NormalizedLinear, tuple[type[nn.Module], dict[str, nn.Parameter | None]]] = {}

    def keep(self) -> None:
        """Makes the change permanent; empties the old weights, so that no other holder reads an untrained copy."""
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
        groups: param groups of an optimizer over the model's parameters, changed in place; empty for a class.
        rank: rank of the factors; a float is a fraction of the weight's shorter side.
        scale: s.
        by_column: one norm per column instead of per row.

    Yields:
        The normalised layers; its ``keep`` makes the change permanent.

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
    """Replaces a weight in a group by the trained parts of its layer, and its name by theirs if the group has names."""
    found = [place for place, parameter in enumerate(group["params"]) if parameter is weight]
    for place in found:
        group["params"][place : place + 1] = [layer._parameters[name] for name in TRAINED]
        if "param_names" in group:
            owner = group["param_names"][place].removesuffix("weight")
            group["param_names"][place : place + 1] = [owner + name for name in TRAINED]
