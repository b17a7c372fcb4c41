"""Fira's residual: what the subspace misses of a gradient is applied too, scaled as the optimizer scales what it holds.

    S = phi (G - P P^T G)     phi_i = ||psi(R)_i|| / ||R_i||, for each row (COLS) or column (ROWS) of G
    W <- W + back_project(L) - lr min(1, 1.01 ||S of before|| / ||S||) S

psi is the optimizer's step before its learning rate. That needs the full gradients, in the backward, of one block at a
time: the optimizer's states stay in the subspace, and the memory of gradients is that of a block.

Source: Fira, Chen et al. 2024, arXiv:2410.01623, equations of sections 4.2 and 4.3. The released code takes
``G - alpha P R`` and leaves Adam's bias correction out of phi; here both are as the formulas have it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from galore_fx.runtime.projected_parameter import ProjectedParameter
from galore_fx.runtime.subspace import ProjectedDim

# The norm of S may grow by so much from one update to the next.
_GROWTH = 1.01
_EPS = 1e-8


@dataclasses.dataclass
class Complement:
    """A gradient without its projection, on its way to the weight.

    Attributes:
        grad: G - P P^T G, (m, n).
        norms: of R's rows (m, 1) or columns (1, n), float32.
        dim: the projected dimension.
        limit: 0-d float32, norm of the last S; 0 before the first. Changed in place.
        lr: the learning rate, negative where the optimizer ascends.
        scale: GaLore's alpha, which is in L and not in S.
    """

    grad: Tensor
    norms: Tensor
    dim: ProjectedDim
    limit: Tensor
    lr: float
    scale: float

    def scaled(self, update: Tensor) -> Tensor:
        """What is to be taken from the weight, (m, n), in the place of the gradient.

        Args:
            update: L, the step in the subspace, learning rate and scale included; of R's shape.
        """
        if self.lr == 0.0:
            return self.grad.zero_()
        phi = _norms(update, self.dim) / (abs(self.lr) * self.scale * (self.norms + _EPS))
        phi = torch.where(self.norms > 0, phi, 0.0)  # momentum moves a row whose gradient is zero
        scaled: Tensor = self.grad.mul_(phi)
        norm = torch.linalg.vector_norm(scaled, dtype=torch.float32)
        shrink = torch.where(self.limit > 0, (_GROWTH * self.limit / (norm + _EPS)).clamp_max(1.0), 1.0)
        self.limit.copy_(norm * shrink)
        return scaled.mul_(shrink * self.lr)


def split_complement(
    record: ProjectedParameter, grad: Tensor | None, projected: Tensor, group: Mapping[str, Any], scale: float
) -> Complement | None:
    """Takes the projection out of a gradient, in place.

    Args:
        record: of the weight.
        grad: G, (m, n), consumed; None where only R has come.
        projected: R, (m, r) or (r, n).
        group: the param group.
        scale: as of ``Complement``.
    """
    if grad is None or record.complement_norm is None:
        return None
    if record.dim is ProjectedDim.COLS:
        grad.addmm_(projected, record.basis.T, alpha=-1)
    else:
        grad.addmm_(record.basis, projected, alpha=-1)
    lr = -float(group["lr"]) if group.get("maximize") else float(group["lr"])
    return Complement(grad, _norms(projected, record.dim), record.dim, record.complement_norm, lr, scale)


def _norms(tensor: Tensor, dim: ProjectedDim) -> Tensor:
    along = 1 if dim is ProjectedDim.COLS else 0
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=along, keepdim=True, dtype=torch.float32)
    return norms
