"""A full gradient as its two factors, ``G = A^T B``; most quantities are computed without forming G."""

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from galore_fx.runtime.subspace.basis_source import BasisSource
from galore_fx.runtime.subspace.projection import ProjectedDim, projected_gradient, wide_norm
from galore_fx.runtime.uniform_loop import alike

# A part of G formed at once has at most this many elements, or 64 rows (columns) if those have more.
PART_ELEMENTS = 2**21
_LEAST_WIDTH = 64


@dataclasses.dataclass(frozen=True)
class GradientProduct:
    """A gradient G (m, n) in factored form, for t tokens.

    Attributes:
        rows: A, (t, m).
        cols: B, (t, n).
    """

    rows: Tensor
    cols: Tensor

    def formed(self) -> Tensor:
        """Returns G, (m, n)."""
        return self.rows.T @ self.cols

    def projected(self, basis: Tensor, dim: ProjectedDim) -> Tensor:
        """Returns R, (m, r) for COLS, (r, n) for ROWS, in the dtype of the factors."""
        return projected_gradient(self.rows, self.cols, basis.to(self.rows.dtype), dim)

    def delivered_for(self, source: BasisSource, projected: Tensor, dim: ProjectedDim) -> Tensor:
        """Returns the output of ``source.deliver`` for these factors.

        Args:
            source: a source that uses the gradient but does not need all of it.
            projected: R.
            dim: the projected dimension.
        """
        dtype = self.rows.dtype
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in source.extra_inputs().items()}
        return source.deliver(self.rows, self.cols, projected.to(dtype), inputs, dim)

    def energies(self, dim: ProjectedDim) -> Tensor:
        """Returns float32 squared norms of G's rows, (m, 1) for COLS, or columns, (1, n) for ROWS; forms G in parts."""
        by_rows = dim is ProjectedDim.COLS
        split, whole = (self.rows, self.cols) if by_rows else (self.cols, self.rows)
        found = torch.empty(split.shape[1], dtype=torch.float32, device=split.device)
        for at in _parts(split.shape[1], whole.shape[1]):
            part = split[:, at].T @ whole if by_rows else whole.T @ split[:, at]
            found[at] = wide_norm(part, 1 if by_rows else 0).view(-1).square()
        return found[:, None] if by_rows else found[None, :]

    def take_from_(self, weight: Tensor, factors: Tensor, dim: ProjectedDim) -> None:
        """Computes ``W <- W - diag(f) G`` (COLS) or ``W - G diag(f)`` (ROWS) in place, in parts of W.

        Args:
            weight: (m, n), changed.
            factors: f, (m, 1) for COLS, (1, n) for ROWS.
            dim: the projected dimension.
        """
        by_rows = dim is ProjectedDim.COLS
        split, whole = (self.rows, self.cols) if by_rows else (self.cols, self.rows)
        for at in _parts(split.shape[1], whole.shape[1]):
            scaled = (split[:, at] * factors.view(-1)[at]).to(split.dtype)
            left, right = (scaled.T, whole) if by_rows else (whole.T, scaled)
            part = weight[at] if by_rows else weight[:, at]
            if part.dtype == left.dtype:
                part.addmm_(left, right, alpha=-1)
            else:  # under autocast
                part.sub_(left @ right)

    def take_from_rows_(self, change: Tensor, factors: Tensor, dim: ProjectedDim, rows: slice) -> None:
        """Subtracts the same from the change (rows, n) of some rows: ``(diag(f) G)[rows]`` or ``(G diag(f))[rows]``."""
        part = self.rows[:, rows].T @ self.cols
        change.sub_(part.to(change.dtype).mul_(factors[rows] if dim is ProjectedDim.COLS else factors))


def _parts(length: int, other: int) -> Iterable[slice]:
    width = max(_LEAST_WIDTH, PART_ELEMENTS // other)
    return (slice(first, first + width) for first in alike(range(0, length, width)))
