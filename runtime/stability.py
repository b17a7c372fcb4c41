"""How much of a new gradient an old subspace still holds: the statistics that a lazy refresh decides by.

All are 1 where nothing has changed. ``sketch_overlap`` and ``gradient_overlap`` weigh every direction by its energy, so
neither the sign nor the order of the vectors matters, and are corrected for what a random subspace would hold: 0 is
chance. ``first_vector_cosine`` is the published one.

Source: Q-GaLore, Zhang et al. 2024, arXiv:2407.08296, section 3.2 (cosine between the first singular vectors of two
refreshes; its sign, which a singular vector does not have, is dropped here). The overlaps are ours.
"""

import torch
from torch import Tensor

from galore_fx.runtime.subspace import ProjectedDim, project
from galore_fx.runtime.wide_norm import wide_norm


def sketch_overlap(old: Tensor, sketch: Tensor) -> float:
    """Share of the energy of a sketch ``G^T G P`` that lies in the span of P, corrected for chance.

    In 16 bits R is balanced before the sketch (subspace.py), and a direction counts by its singular value squared and
    not to the fourth power: the share of a subspace that stays comes out somewhat lower, and bases are renewed sooner.

    Args:
        old: P, (n, r), orthonormal.
        sketch: (n, r).
    """
    sketch = sketch.float()
    held = (old.float().T @ sketch).square().sum() / sketch.square().sum()
    return _corrected(float(held), old.shape[1] / old.shape[0])


def gradient_overlap(grad: Tensor, old: Tensor, new: Tensor, dim: ProjectedDim) -> float:
    """Energy of a gradient in the old subspace by that in the new one, corrected for chance.

    Args:
        grad: G, (m, n).
        old, new: bases (m, r) or (n, r), orthonormal.
        dim: the projected dimension.
    """
    whole, before, after = map(_energy, (grad, project(grad, old, dim), project(grad, new, dim)))
    if after == 0.0:
        return 0.0
    return _corrected(before / after, whole * old.shape[1] / old.shape[0] / after)


def first_vector_cosine(old: Tensor, new: Tensor) -> float:
    """|cos| between the first columns of two bases."""
    return float(torch.nn.functional.cosine_similarity(old[:, 0].float(), new[:, 0].float(), dim=0).abs())


def _energy(tensor: Tensor) -> float:
    return float(wide_norm(tensor)) ** 2


def _corrected(share: float, chance: float) -> float:
    """0 where the share is what chance gives, 1 where it is whole."""
    return (share - chance) / (1 - chance) if chance < 1 else 1.0
