"""Merges the low-rank changes of normalised layers into their frozen weights periodically, to train from scratch.

Without merges the total change of a weight never exceeds the rank of its factors. A merge keeps the function of the
model. The new factors have new coordinates, so their optimizer states start anew and the next updates refresh their
bases.

This is our addition: GradNormLoRP (arXiv:2412.19616) does not state how its factors train a model from random weights.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from galore_fx.runtime.formats.counter_rng import generator_of, key_of
from galore_fx.runtime.layers.normalized_linear import FACTORS, NormalizedLinear
from galore_fx.runtime.subspace.moment_transfer import reset_moments
from galore_fx.runtime.subspace.projected_parameter import ProjectedParameter

# Separates these draws from the draws of heads and of the rounding.
_SEED = 2


class FactorMerge:
    """Merges the factors of one model at a fixed interval.

    Args:
        layers: the layers to merge.
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
        """Merges all layers if ``num_updates`` is a multiple of the gap.

        Args:
            num_updates: number of finished updates.
            records: records of the factors, by the factor's ``id``.
            states: optimizer states, by parameter.
            like: creates new states of the optimizer class for a parameter and a gradient.
        """
        if num_updates % self._gap:
            return
        for number, layer in enumerate(self._layers):
            layer.merge_(generator_of(key_of(_SEED, num_updates, number)))
            for name in FACTORS:
                record = records[id(getattr(layer, name))]
                reset_moments(states[record.weight], like(record.weight, record.leaf))
