"""A full gradient as its two factors, ``G = A^T B``: what is wanted of it is made without forming it."""

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from galore_fx.runtime.subspace.basis_source import BasisSource
from galore_fx.runtime.subspace.projection import ProjectedDim, projected_gradient, wide_norm
from galore_fx.runtime.uniform_loop import alike

# What is formed of G at once has at most so many elements, or 64 rows (columns) where those are more.
PART_ELEMENTS = 2**21
_LEAST_WIDTH = 64


@dataclasses.dataclass(frozen=True)
class GradientProduct:
    """G (m, n) as A (t, m) and B (t, n), for t tokens."""

    rows: Tensor
    cols: Tensor

    def formed(self) -> Tensor:
        """G, (m, n)."""
        return self.rows.T @ self.cols

    def projected(self, basis: Tensor, dim: ProjectedDim) -> Tensor:
        """R, (m, r) for COLS, (r, n) for ROWS."""
        return projected_gradient(self.rows, self.cols, basis.to(self.rows.dtype), dim)

    def delivered_for(self, source: BasisSource, projected: Tensor, dim: ProjectedDim) -> Tensor:
        """What the source of the next basis makes of the factors.

        Args:
            source: one that looks at the gradient and does not need all of it.
            projected: R.
            dim: the projected dimension.
        """
        dtype = self.rows.dtype
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in source.extra_inputs().items()}
        return source.deliver(self.rows, self.cols, projected.to(dtype), inputs, dim)

    def energies(self, dim: ProjectedDim) -> Tensor:
        """Squared norms of G's rows, (m, 1) for COLS, or columns, (1, n) for ROWS; float32, a part of G at a time."""
        by_rows = dim is ProjectedDim.COLS
        split, whole = (self.rows, self.cols) if by_rows else (self.cols, self.rows)
        found = torch.empty(split.shape[1], dtype=torch.float32, device=split.device)
        for at in _parts(split.shape[1], whole.shape[1]):
            part = split[:, at].T @ whole if by_rows else whole.T @ split[:, at]
            found[at] = wide_norm(part, 1 if by_rows else 0).view(-1).square()
        return found[:, None] if by_rows else found[None, :]

    def take_from_(self, weight: Tensor, factors: Tensor, dim: ProjectedDim) -> None:
        """``W <- W - diag(f) G`` (COLS) or ``W - G diag(f)`` (ROWS) in place, a part of W at a time.

        Args:
            weight: (m, n), changed.
            factors: f, (m, 1) for COLS, (1, n) for ROWS.
            dim: which of them.
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
        """The same for a change (rows, n) of some rows: ``change -= (diag(f) G)[rows]`` or ``(G diag(f))[rows]``."""
        part = self.rows[:, rows].T @ self.cols
        change.sub_(part.to(change.dtype).mul_(factors[rows] if dim is ProjectedDim.COLS else factors))


def _parts(length: int, other: int) -> Iterable[slice]:
    width = max(_LEAST_WIDTH, PART_ELEMENTS // other)
    return (slice(first, first + width) for first in alike(range(0, length, width)))
