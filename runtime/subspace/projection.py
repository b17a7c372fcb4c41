"""Low-rank subspaces of a gradient: which side shrinks, and how a gradient gets into the subspace and back.

    COLS   basis P (n, r)   R = G P      (m, r)   U = N P^T
    ROWS   basis P (m, r)   R = P^T G    (r, n)   U = P N

A basis has the shape (size of the projected dimension, rank) with orthonormal columns. With a granularity of c it has
(size / c, rank / c): the dimension is cut into c parts, each with the same basis, so that P is ``I_c (x) basis`` and is
never formed (VLoRP, arXiv:2505.01744: G (m, n) as (m c, n / c)).
"""

import enum

import torch
from torch import Tensor


class ProjectedDim(enum.Enum):
    """Which dimension of an (m, n) gradient shrinks to the rank."""

    ROWS = "rows"
    COLS = "cols"

    def basis_shape(self, shape: tuple[int, int], rank: int, granularity: int = 1) -> tuple[int, int]:
        """(m, r) for ROWS, (n, r) for COLS; both divided by the granularity, which divides both."""
        size = shape[0] if self is ProjectedDim.ROWS else shape[1]
        return (size // granularity, rank // granularity)

    def projected_shape(self, shape: tuple[int, int], rank: int) -> tuple[int, int]:
        """(r, n) for ROWS, (m, r) for COLS."""
        return (rank, shape[1]) if self is ProjectedDim.ROWS else (shape[0], rank)


def project(grad: Tensor, basis: Tensor, dim: ProjectedDim) -> Tensor:
    """Coordinates of a gradient in the subspace: ``P^T G`` (r, n) for ROWS, ``G P`` (m, r) for COLS.

    Source: GaLore, Zhao et al. 2024, arXiv:2403.03507, section 3.
    """
    if dim is ProjectedDim.COLS:
        return coordinates(grad, basis)
    if len(grad) == len(basis):
        return basis.T @ grad
    parts: Tensor = basis.T @ grad.unflatten(0, (-1, len(basis)))
    return parts.flatten(0, 1)


def coordinates(vectors: Tensor, basis: Tensor) -> Tensor:
    """Of vectors (t, size) in the subspace: ``V P``, (t, r), part by part where the basis is that of one part."""
    if vectors.shape[-1] == basis.shape[0]:
        return vectors @ basis
    parts: Tensor = vectors.unflatten(-1, (-1, basis.shape[0])) @ basis
    return parts.flatten(-2)


def add_back_projection_(weight: Tensor, update: Tensor, basis: Tensor, dim: ProjectedDim, decay: float) -> None:
    """``W <- decay * W + back_project(update)`` in place, in one matrix product and without an (m, n) temporary.

    Args:
        weight: (m, n), changed.
        update: (r, n) for ROWS, (m, r) for COLS, already scaled.
        basis: (m, r) or (n, r), or that of one part.
        dim: the projected dimension.
        decay: factor of the weight, 1.0 to leave it.
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
    elif weight.is_contiguous():  # one product; in a batch of parts it is several times as slow
        weight.view(-1, size).addmm_(update.reshape(-1, rank), basis.T, beta=decay)
    else:
        parts = weight.unflatten(1, (-1, size)).transpose(0, 1)
        updates = update.unflatten(1, (-1, rank)).transpose(0, 1)
        parts.baddbmm_(updates, basis.T.expand(len(parts), -1, -1), beta=decay)


def back_projected_rows(update: Tensor, basis: Tensor, dim: ProjectedDim, rows: slice) -> Tensor:
    """Some rows of ``back_project(update)``, (rows, n); for ROWS with a basis of parts they lie inside one part.

    Args:
        update: (r, n) for ROWS, (m, r) for COLS.
        basis: (m, r) or (n, r), or that of one part; of the dtype of ``update``.
        dim: the projected dimension.
        rows: which rows.
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
    """A zero tensor of this shape that requires grad and owns one element of storage."""
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(shape).requires_grad_()


def wide_norm(tensor: Tensor, dim: int | None = None) -> Tensor:
    """The 2-norm in float32, or in float64 where the tensor is.

    Args:
        tensor: any shape.
        dim: along which, kept as 1; None for all, 0-d.
    """
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(tensor, dim=dim, keepdim=dim is not None, dtype=dtype)
    return norm


def projected_gradient(rows: Tensor, cols: Tensor, basis: Tensor, dim: ProjectedDim) -> Tensor:
    """``R`` of ``G = rows^T cols`` without forming ``G``.

    Args:
        rows: A, (t, m).
        cols: B, (t, n).
        basis: P, (m, r) for ROWS, (n, r) for COLS, or that of one part.
        dim: the projected dimension.

    Returns:
        (r, n) for ROWS, (m, r) for COLS.
    """
    if dim is ProjectedDim.ROWS:
        return coordinates(rows, basis).T @ cols
    return rows.T @ coordinates(cols, basis)
