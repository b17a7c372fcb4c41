"""Low-rank projection of a gradient, and the projection back.

    COLS   basis P (n, r)   R = G P      (m, r)   U = N P^T
    ROWS   basis P (m, r)   R = P^T G    (r, n)   U = P N

A basis has orthonormal columns and the shape (size of the projected dimension, rank). With a granularity of c its shape
is (size / c, rank / c): the dimension is cut into c parts with the same basis, so P is ``I_c (x) basis``. P is never
formed (VLoRP, arXiv:2505.01744: G (m, n) as (m c, n / c)).
"""

import enum

import torch
from torch import Tensor


class ProjectedDim(enum.Enum):
    """The dimension of an (m, n) gradient that is reduced to the rank."""

    ROWS = "rows"
    COLS = "cols"

    def basis_shape(self, shape: tuple[int, int], rank: int, granularity: int = 1) -> tuple[int, int]:
        """Returns (m, r) for ROWS, (n, r) for COLS; both sizes divided by the granularity, which must divide them."""
        size = shape[0] if self is ProjectedDim.ROWS else shape[1]
        return (size // granularity, rank // granularity)

    def projected_shape(self, shape: tuple[int, int], rank: int) -> tuple[int, int]:
        """Returns (r, n) for ROWS, (m, r) for COLS."""
        return (rank, shape[1]) if self is ProjectedDim.ROWS else (shape[0], rank)


def project(grad: Tensor, basis: Tensor, dim: ProjectedDim) -> Tensor:
    """Returns the coordinates of a gradient in the subspace: ``P^T G`` (r, n) for ROWS, ``G P`` (m, r) for COLS.

    Source: GaLore, Zhao et al. 2024, arXiv:2403.03507, section 3.
    """
    if dim is ProjectedDim.COLS:
        return coordinates(grad, basis)
    if len(grad) == len(basis):
        return basis.T @ grad
    parts: Tensor = basis.T @ grad.unflatten(0, (-1, len(basis)))
    return parts.flatten(0, 1)


def coordinates(vectors: Tensor, basis: Tensor) -> Tensor:
    """Returns the coordinates ``V P`` (t, r) of vectors (t, size); part by part if the basis belongs to one part."""
    if vectors.shape[-1] == basis.shape[0]:
        return vectors @ basis
    parts: Tensor = vectors.unflatten(-1, (-1, basis.shape[0])) @ basis
    return parts.flatten(-2)


def add_back_projection_(weight: Tensor, update: Tensor, basis: Tensor, dim: ProjectedDim, decay: float) -> None:
    """Computes ``W <- decay * W + back_project(update)`` in place, by one product without an (m, n) temporary.

    Args:
        weight: (m, n), changed.
        update: (r, n) for ROWS, (m, r) for COLS, already scaled.
        basis: (m, r) or (n, r), or the basis of one part.
        dim: the projected dimension.
        decay: factor of the weight; 1.0 for no decay.
    """
    update = update.to(weight.dtype)
    if basis.shape[0] != weight.shape[0 if dim is ProjectedDim.ROWS else 1]:
        _add_parts_(weight, update, basis, dim, decay)
    elif dim is ProjectedDim.ROWS:
        weight.addmm_(basis, update, beta=decay)
    else:
        weight.addmm_(update, basis.T, beta=decay)


def _add_parts_(weight: Tensor, update: Tensor, basis: Tensor, dim: ProjectedDim, decay: float) -> None:
    size, rank = basis.shape
    if dim is ProjectedDim.ROWS:
        parts = weight.unflatten(0, (-1, size))
        parts.baddbmm_(basis.expand(len(parts), -1, -1), update.unflatten(0, (-1, rank)), beta=decay)
    elif weight.is_contiguous():  # one product; a batch of parts is several times as slow
        weight.view(-1, size).addmm_(update.reshape(-1, rank), basis.T, beta=decay)
    else:
        parts = weight.unflatten(1, (-1, size)).transpose(0, 1)
        updates = update.unflatten(1, (-1, rank)).transpose(0, 1)
        parts.baddbmm_(updates, basis.T.expand(len(parts), -1, -1), beta=decay)


def back_projected_rows(update: Tensor, basis: Tensor, dim: ProjectedDim, rows: slice) -> Tensor:
    """Returns some rows of ``back_project(update)``, (rows, n).

    Args:
        update: (r, n) for ROWS, (m, r) for COLS.
        basis: (m, r) or (n, r), or the basis of one part; the dtype of ``update``.
        dim: the projected dimension.
        rows: the rows; for ROWS with several parts they must lie inside one part.
    """
    size, rank = basis.shape
    if dim is ProjectedDim.ROWS:
        part = rows.start // size
        return basis[rows.start - part * size : rows.stop - part * size] @ update[part * rank : (part + 1) * rank]
    if update.shape[1] == rank:
        return update[rows] @ basis.T
    parts: Tensor = update[rows].unflatten(1, (-1, rank)) @ basis.T
    return parts.flatten(1)


def storage_free_leaf(shape: tuple[int, int], like: Tensor) -> Tensor:
    """Returns a zero tensor of this shape that requires grad and owns one element of storage."""
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(shape).requires_grad_()


def wide_norm(tensor: Tensor, dim: int | None = None) -> Tensor:
    """Returns the 2-norm, computed in float32, or in float64 for a float64 tensor.

    Args:
        tensor: any shape.
        dim: the reduced dimension, kept with size 1; None for the norm of all elements, 0-d.
    """
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(tensor, dim=dim, keepdim=dim is not None, dtype=dtype)
    return norm


def projected_gradient(rows: Tensor, cols: Tensor, basis: Tensor, dim: ProjectedDim) -> Tensor:
    """Returns ``R`` of ``G = rows^T cols`` without forming ``G``.

    Args:
        rows: A, (t, m).
        cols: B, (t, n).
        basis: P, (m, r) for ROWS, (n, r) for COLS, or the basis of one part.
        dim: the projected dimension.

    Returns:
        (r, n) for ROWS, (m, r) for COLS.
    """
    if dim is ProjectedDim.ROWS:
        return coordinates(rows, basis).T @ cols
    return rows.T @ coordinates(cols, basis)
