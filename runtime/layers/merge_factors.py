"""Adds the low-rank changes of normalised layers to their frozen weights, again and again, for training from scratch.

Without it the change of a weight has the factors' rank for ever. The function of the model stays what it was; the new
factors have new coordinates, so their optimizer states start anew and their bases are renewed in the next updates.

Ours: GradNormLoRP (arXiv:2412.19616) does not say how its factors train a model from random weights.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from galore_fx.runtime.formats.counter_rng import generator_of, key_of
from galore_fx.runtime.layers.normalized_linear import FACTORS, NormalizedLinear
from galore_fx.runtime.subspace.moment_transfer import reset_moments
from galore_fx.runtime.subspace.projected_parameter import ProjectedParameter

# Keeps these draws apart from those of heads and of the rounding.
_SEED = 2


class FactorMerge:
    """Merges of one model.

    Args:
        layers: those that are merged.
        gap: updates between two merges.
    """

    def __init__(self, layers: Sequence[NormalizedLinear], gap: int) -> None:
        self._layers, self._gap = layers, gap

    def after_update(
        self,
        num_updates: int,
        records: Mapping[int, ProjectedParameter],
        states: Mapping[Tensor, dict[str, Any]],
        like: Callable[[Tensor, Tensor], dict[str, Tensor]],
    ) -> None:
        """Merges all layers where it is time.

        Args:
            num_updates: finished updates.
            records: of the factors, by their identity.
            states: of the optimizer, by parameter.
            like: new states of the optimizer class for a parameter and a gradient.
        """
        if num_updates % self._gap:
            return
        for number, layer in enumerate(self._layers):
            layer.merge_(generator_of(key_of(_SEED, num_updates, number)))
            for name in FACTORS:
                record = records[id(getattr(layer, name))]
                reset_moments(states[record.weight], like(record.weight, record.leaf))
