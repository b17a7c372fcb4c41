"""Fira's residual: what the subspace misses of a gradient is applied too, scaled as the optimizer scales what it holds.

    S = phi (G - P P^T G)     phi_i = ||psi(R)_i|| / ||R_i||, for each row (COLS) or column (ROWS) of G
    W <- W + back_project(L) - lr min(1, 1.01 ||S of before|| / ||S||) S

psi is the optimizer's step before its learning rate. Of all entries, or of some of them (sparse.py).

Of all: G comes as A and B of ``G = A^T B``, or formed where the backward cannot give those. Of the former phi and the
norm of S follow from R and from the norms of G's rows, for which G is formed a part at a time; S itself is two
products, accumulated straight into W.

Source: Fira, Chen et al. 2024, arXiv:2410.01623, equations of sections 4.2 and 4.3. The released code takes
``G - alpha P R`` and leaves Adam's bias correction out of phi; here both are as the formulas have it.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from galore_fx.runtime.remainder.sparse import add_at_, add_in_rows_, entries_of
from galore_fx.runtime.subspace.factored_gradient import GradientProduct
from galore_fx.runtime.subspace.projected_parameter import ProjectedParameter
from galore_fx.runtime.subspace.projection import ProjectedDim, wide_norm

# The norm of S may grow by so much from one update to the next.
_GROWTH = 1.01
_EPS = 1e-8


@dataclasses.dataclass
class Complement(abc.ABC):
    """A gradient without its projection, on its way to the weight.

    Attributes:
        dim: the projected dimension.
        norms: of R's rows (m, 1) or columns (1, n), float32.
        limit: 0-d float32, norm of the last S; 0 before the first. Changed in place.
        lr: the learning rate, negative where the optimizer ascends.
        scale: GaLore's alpha, which is in L and not in S.
    """

    dim: ProjectedDim
    norms: Tensor
    limit: Tensor
    lr: float
    scale: float

    @abc.abstractmethod
    def join(self, update: Tensor) -> Tensor:
        """L with what of S is in the subspace's coordinates.

        Args:
            update: L, the step in the subspace, learning rate and scale included; of R's shape.
        """

    @abc.abstractmethod
    def take_from_(self, weight: Tensor) -> None:
        """Takes the rest of S from the weight (m, n), in place, after ``join``."""

    @abc.abstractmethod
    def add_to_rows_(self, change: Tensor, rows: slice) -> None:
        """Takes these rows of the rest of S from what is to be added to them, (rows, n), in place."""

    def _phi(self, update: Tensor) -> Tensor:
        phi = _norms(update, self.dim) / (abs(self.lr) * self.scale * (self.norms + _EPS))
        return torch.where(self.norms > 0, phi, 0.0)  # momentum moves a row whose gradient is zero

    def _step_size(self, norm: Tensor) -> Tensor:
        """The learning rate, smaller where the norm of S has grown by too much; notes the norm."""
        shrink = torch.where(self.limit > 0, (_GROWTH * self.limit / (norm + _EPS)).clamp_max(1.0), 1.0)
        self.limit.copy_(norm * shrink)
        return shrink * self.lr


@dataclasses.dataclass
class FormedComplement(Complement):
    """One that has been formed, or some entries of it.

    Attributes:
        grad: G - P P^T G, (m, n), or (m, k) of its entries; then S times its step size.
        columns: (b, k) int32, which entries; None for all.
    """

    grad: Tensor
    columns: Tensor | None = None

    def join(self, update: Tensor) -> Tensor:
        """L as it is."""
        if self.lr == 0.0:
            self.grad.zero_()
            return update
        phi = self._phi(update)
        if self.columns is not None and self.dim is ProjectedDim.ROWS:
            phi = entries_of(phi.expand(self.grad.shape[0], -1), self.columns)
        self.grad.mul_(phi)
        self.grad.mul_(self._step_size(wide_norm(self.grad)))
        return update

    def take_from_(self, weight: Tensor) -> None:
        """All of S."""
        if self.columns is None:
            weight.sub_(self.grad)
        else:
            add_at_(weight, self.columns, self.grad.neg_())

    def add_to_rows_(self, change: Tensor, rows: slice) -> None:
        """Some rows of S."""
        if self.columns is None:
            change.sub_(self.grad[rows])
        else:
            add_in_rows_(change, rows, self.columns, -self.grad[rows])


@dataclasses.dataclass
class FactoredComplement(Complement):
    """One whose gradient is there as A and B.

    Attributes:
        product: those.
        projected: R, (m, r) or (r, n), not consumed by the step.
        energies: squared norms of the rows (m, 1) or columns (1, n) of G - P P^T G, float32.
    """

    product: GradientProduct
    projected: Tensor
    energies: Tensor
    _factors: Tensor | None = None

    def join(self, update: Tensor) -> Tensor:
        """L and what S takes back of the projection."""
        if self.lr == 0.0:
            return update
        phi = self._phi(update)
        self._factors = phi * self._step_size((phi * phi * self.energies).sum().sqrt())
        return update + (self.projected * self._factors).to(update.dtype)

    def take_from_(self, weight: Tensor) -> None:
        """G, scaled."""
        if self._factors is not None:
            self.product.take_from_(weight, self._factors, self.dim)

    def add_to_rows_(self, change: Tensor, rows: slice) -> None:
        """Some rows of G, scaled."""
        if self._factors is not None:
            self.product.take_from_rows_(change, self._factors, self.dim, rows)


def complement_at(
    record: ProjectedParameter, errors: Tensor, projected: Tensor, group: Mapping[str, Any], scale: float
) -> Complement:
    """What the projection leaves of a gradient at the entries of the weight's residual.

    Args:
        record: of the weight.
        errors: G - P P^T G there, (m, k); consumed.
        projected, group, scale: as of ``complement_of``.
    """
    residual = record.residual
    assert residual is not None and residual.norm is not None
    about = (record.dim, _norms(projected, record.dim), residual.norm, _learning_rate(group), scale)
    return FormedComplement(*about, errors, residual.columns)


def complement_of(
    record: ProjectedParameter,
    grad: Tensor | GradientProduct,
    energies: Tensor | None,
    projected: Tensor,
    group: Mapping[str, Any],
    scale: float,
) -> Complement:
    """What the projection leaves of a gradient.

    Args:
        record: of the weight.
        grad: G, (m, n), or its factors; consumed.
        energies: those of its factors' product.
        projected: R, (m, r) or (r, n); will be consumed by the step.
        group: the param group.
        scale: as of ``Complement``.
    """
    assert record.complement_norm is not None
    about = (record.dim, _norms(projected, record.dim), record.complement_norm, _learning_rate(group), scale)
    if isinstance(grad, GradientProduct):
        assert energies is not None
        missed = energies - 2 * about[1].square() + _energies_back(projected, record.basis, record.dim)
        return FactoredComplement(*about, grad, projected.clone(), missed.clamp_min(0.0))
    if record.dim is ProjectedDim.COLS:
        grad.addmm_(projected, record.basis.T, alpha=-1)
    else:
        grad.addmm_(record.basis, projected, alpha=-1)
    return FormedComplement(*about, grad)


def _learning_rate(group: Mapping[str, Any]) -> float:
    return -float(group["lr"]) if group.get("maximize") else float(group["lr"])


def _energies_back(projected: Tensor, basis: Tensor, dim: ProjectedDim) -> Tensor:
    """Squared norms of the rows or columns of P R: those of R, but for what the basis is not orthonormal by."""
    gram, low = basis.float().T @ basis.float(), projected.float()
    if dim is ProjectedDim.COLS:
        return (low @ gram * low).sum(1, keepdim=True)
    return (gram @ low * low).sum(0, keepdim=True)


def _norms(tensor: Tensor, dim: ProjectedDim) -> Tensor:
    return wide_norm(tensor, 1 if dim is ProjectedDim.COLS else 0)
