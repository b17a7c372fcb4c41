"""Fira's residual: applies the remainder of a gradient too, scaled as the optimizer scales the projected part.

    S = phi (G - P P^T G)     phi_i = ||psi(R)_i|| / ||R_i||, for each row (COLS) or column (ROWS) of G
    W <- W + back_project(L) - lr min(1, 1.01 ||previous S|| / ||S||) S

psi is the step of the optimizer before its learning rate. S covers all entries, or some of them (sparse.py).

For all entries G comes as A and B of ``G = A^T B``, or formed if the backward cannot deliver the factors. With factors,
phi and the norm of S follow from R and the norms of G's rows (columns for ROWS), for which G is formed in parts. S
itself is two products, accumulated directly into W.

Source: Fira, Chen et al. 2024, arXiv:2410.01623, equations of sections 4.2 and 4.3. The released code uses
``G - alpha P R`` and omits Adam's bias correction from phi; here both follow the formulas.
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

# Largest growth factor of the norm of S per update.
_GROWTH = 1.01
_EPS = 1e-8


@dataclasses.dataclass
class Complement(abc.ABC):
    """The remainder of a gradient, to be scaled and applied to the weight.

    Attributes:
        dim: the projected dimension.
        norms: norms of R's rows (m, 1) for COLS or columns (1, n) for ROWS, float32.
        limit: 0-d float32, norm of the last applied S; 0 before the first. Changed in place.
        lr: the learning rate, negative if the optimizer maximises.
        scale: GaLore's alpha, which is contained in L but not in S.
    """

    dim: ProjectedDim
    norms: Tensor
    limit: Tensor
    lr: float
    scale: float

    @abc.abstractmethod
    def join(self, update: Tensor) -> Tensor:
        """Scales S and returns L plus the part of S that lies in the coordinates of the subspace.

        Args:
            update: L, the step in the subspace, including learning rate and scale; the shape of R.
        """

    @abc.abstractmethod
    def take_from_(self, weight: Tensor) -> None:
        """Subtracts the rest of S from the weight (m, n) in place. Must follow ``join``."""

    @abc.abstractmethod
    def add_to_rows_(self, change: Tensor, rows: slice) -> None:
        """Subtracts these rows of the rest of S from their change (rows, n), in place. Must follow ``join``."""

    def _phi(self, update: Tensor) -> Tensor:
        phi = _norms(update, self.dim) / (abs(self.lr) * self.scale * (self.norms + _EPS))
        return torch.where(self.norms > 0, phi, 0.0)  # a zero gradient row has phi 0, even if momentum moves it

    def _step_size(self, norm: Tensor) -> Tensor:
        """Returns the learning rate, reduced if the norm of S has grown by too much; stores the reduced norm."""
        shrink = torch.where(self.limit > 0, (_GROWTH * self.limit / (norm + _EPS)).clamp_max(1.0), 1.0)
        self.limit.copy_(norm * shrink)
        return shrink * self.lr


@dataclasses.dataclass
class FormedComplement(Complement):
    """A remainder that has been formed, at all or some entries.

    Attributes:
        grad: G - P P^T G, (m, n), or (m, k) at some entries; after ``join``, S times its step size.
        columns: (b, k) int32, the entries; None for all.
    """

    grad: Tensor
    columns: Tensor | None = None

    def join(self, update: Tensor) -> Tensor:
        """Scales S; returns L unchanged."""
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
        """Subtracts all of S."""
        if self.columns is None:
            weight.sub_(self.grad)
        else:
            add_at_(weight, self.columns, self.grad.neg_())

    def add_to_rows_(self, change: Tensor, rows: slice) -> None:
        """Subtracts some rows of S."""
        if self.columns is None:
            change.sub_(self.grad[rows])
        else:
            add_in_rows_(change, rows, self.columns, -self.grad[rows])


@dataclasses.dataclass
class FactoredComplement(Complement):
    """A remainder whose gradient is given by the factors A and B.

    Attributes:
        product: the factors.
        projected: a copy of R, (m, r) or (r, n), which the step does not consume.
        energies: squared norms of the rows (m, 1) or columns (1, n) of G - P P^T G, float32.
    """

    product: GradientProduct
    projected: Tensor
    energies: Tensor
    _factors: Tensor | None = None

    def join(self, update: Tensor) -> Tensor:
        """Returns L plus the scaled R, which compensates for the projection of the scaled G."""
        if self.lr == 0.0:
            return update
        phi = self._phi(update)
        self._factors = phi * self._step_size((phi * phi * self.energies).sum().sqrt())
        return update + (self.projected * self._factors).to(update.dtype)

    def take_from_(self, weight: Tensor) -> None:
        """Subtracts the scaled G."""
        if self._factors is not None:
            self.product.take_from_(weight, self._factors, self.dim)

    def add_to_rows_(self, change: Tensor, rows: slice) -> None:
        """Subtracts some rows of the scaled G."""
        if self._factors is not None:
            self.product.take_from_rows_(change, self._factors, self.dim, rows)


def complement_at(
    record: ProjectedParameter, errors: Tensor, projected: Tensor, group: Mapping[str, Any], scale: float
) -> Complement:
    """Creates the remainder of a gradient at the entries of the weight's sparse residual.

    Args:
        record: record of the weight.
        errors: G - P P^T G at the entries, (m, k); overwritten.
        projected, group, scale: as for ``complement_of``.
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
    """Creates the remainder of a gradient at all entries.

    Args:
        record: record of the weight.
        grad: G, (m, n), which is overwritten, or its factors.
        energies: squared norms of G's rows or columns, float32; required with factors, otherwise unused.
        projected: R, (m, r) or (r, n); the step will consume it.
        group: the param group.
        scale: as for ``Complement``.
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
    """Returns squared norms of the rows or columns of the back-projected R; equal to R's for an orthonormal basis."""
    gram, low = basis.float().T @ basis.float(), projected.float()
    if dim is ProjectedDim.COLS:
        return (low @ gram * low).sum(1, keepdim=True)
    return (gram @ low * low).sum(0, keepdim=True)


def _norms(tensor: Tensor, dim: ProjectedDim) -> Tensor:
    return wide_norm(tensor, 1 if dim is ProjectedDim.COLS else 0)
