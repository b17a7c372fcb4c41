"""Entries of a projected weight that are trained at full rank: the same number in each row, learnt in a warm-up.

    columns (m, k)   which entries, k in each of the m rows
    Z (m, k)         a leaf without storage; its gradient is G at these entries

    additive         E = G - back_project(R) at the entries; the optimizer's step on E is added there
    rectified        the optimizer's step on G at the entries takes the place of the back-projected one there

*Rectified* is what correcting the moments amounts to: the first moment is linear, so the back-projected one plus that
of E is the first moment of G (as long as the basis stays, and rightly so when it changes); the second is not linear and
is kept of G.

Which entries: in the warm-up all k slots of a row are measured in each update. Half of them, those of the largest mean
|E|, are kept for the next one, in the last quarter of the warm-up more and more of them; the others try columns that
are not kept, drawn at random. So nothing of the weight's size is held, and every row ends with k different columns. All
columns have had their turn after about 2 / density updates.

Source: GaLore+, Liao et al. 2024, arXiv:2412.19820 (sparsely coded residuals, indices learnt in a warm-up); the body of
the paper was not at hand: both variants, the equal numbers in each row and the contest for them are reconstructed.
"""

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from galore_fx.runtime.leaf import storage_free_leaf
from galore_fx.runtime.random_thresholds import key_of
from galore_fx.runtime.repetition import alike
from galore_fx.runtime.subspace import ProjectedDim

# A block of rows is worked on at once, whose widest temporary has at most so many elements.
BLOCK_ELEMENTS = 2**20
# The graph of a backward has at most so many blocks of rows of the gradient.
MAX_BLOCKS = 8
# Of a measurement in the running mean: about the last seven count.
_WEIGHT_OF_NEW = 0.25
# Keeps these lots apart from other draws of the same update and weight.
_SEED = 2
# Up to this density the sampled products of single entries are cheaper than whole rows of G and a gather from them:
# (tools/bench.py residual) one entry costs a cache line for each token, a whole row goes through the matrix product.
SAMPLED_DENSITY = 1 / 128


@dataclasses.dataclass(eq=False)
class SparseResidual:
    """The entries of one weight.

    Attributes:
        columns: (m, k) int32, different ones in each row; changed in place.
        leaf: Z, (m, k); its ``.grad`` is G at the entries.
        rectified: which variant.
        warm_up: updates in which the entries are learnt.
        scores: (m, k) bfloat16, running mean of |E| of each slot, 0 for one that has not been measured; None once the
            entries are learnt.
    """

    columns: Tensor
    leaf: Tensor
    rectified: bool
    warm_up: int
    scores: Tensor | None = None

    @classmethod
    def create(cls, weight: Tensor, density: float, *, rectified: bool, warm_up: int, key: int) -> "SparseResidual":
        """For a weight (m, n): evenly spread entries, which the warm-up replaces.

        Args:
            weight: the weight.
            density: share of its entries.
            rectified, warm_up: as of the class.
            key: another one for each weight.
        """
        num_rows, num_columns = weight.shape
        num_slots = num_entries(density, num_columns)
        steps = torch.arange(num_slots) * num_columns // num_slots
        shifts = torch.arange(num_rows)[:, None] * 7919 + key  # a prime: neighbouring rows start far apart
        columns = ((steps + shifts) % num_columns).to(torch.int32).to(weight.device)
        residual = cls(columns, storage_free_leaf((num_rows, num_slots), weight), rectified, warm_up)
        residual.set_learning(0)
        return residual

    def set_learning(self, num_updates: int) -> None:
        """Whether it learns is a matter of how many updates have been done."""
        if num_updates >= self.warm_up:
            self.scores = None
        elif self.scores is None:
            self.scores = torch.zeros_like(self.columns, dtype=torch.bfloat16)

    @property
    def is_learning(self) -> bool:
        """Whether the entries are still being chosen; nothing is updated by them then."""
        return self.scores is not None

    def learn(self, errors: Tensor, num_columns: int, num_updates: int, key: int) -> None:
        """Notes |E| of the slots, keeps the largest and tries other columns in the place of the rest.

        Args:
            errors: E, (m, k).
            num_columns: n.
            num_updates: updates of the warm-up that are done, this one not counted.
            key: says which columns are tried next.
        """
        assert self.scores is not None
        num_slots = self.columns.shape[1]
        # Half of the slots, in the last quarter of the warm-up more and more, and in the end all.
        done = max(0.0, 4 * (num_updates + 1) / self.warm_up - 3)
        num_kept = math.ceil(num_slots * (1 + done) / 2)
        for index, rows in enumerate(alike(list(row_blocks(self.columns.shape[0], num_columns)))):
            scores, measured = self.scores[rows].float(), errors[rows].abs().float()
            means = torch.where(scores > 0, scores.lerp(measured, _WEIGHT_OF_NEW), measured)
            kept = means.topk(num_kept, dim=1).indices
            columns = self.columns[rows].gather(1, kept)
            generator = torch.Generator().manual_seed(key_of(_SEED, key, index) & 0xFFFFFFFF)
            lots = torch.rand((columns.shape[0], num_columns), generator=generator).to(columns.device)
            lots.scatter_(1, columns.long(), 2.0)  # kept columns are not tried again
            tried = lots.topk(num_slots - num_kept, dim=1, largest=False).indices
            self.columns[rows] = torch.cat([columns, tried.to(torch.int32)], dim=1)
            unmeasured = means.new_zeros(tried.shape)
            self.scores[rows] = torch.cat([means.gather(1, kept), unmeasured], dim=1).to(self.scores.dtype)


def num_entries(density: float, num_columns: int) -> int:
    """Entries of a row."""
    return max(1, min(num_columns, round(density * num_columns)))


def row_blocks(num_rows: int, row_elements: int) -> Iterator[slice]:
    """Rows in blocks of at most ``BLOCK_ELEMENTS``."""
    size = max(1, BLOCK_ELEMENTS // max(1, row_elements))
    for first in range(0, num_rows, size):
        yield slice(first, min(first + size, num_rows))


def gradient_at(rows: Tensor, cols: Tensor, columns: Tensor) -> Tensor:
    """``G = rows^T cols`` at some entries: from whole rows of G, a block at a time, or from sampled products.

    Args:
        rows: A, (t, m).
        cols: B, (t, n).
        columns: (m, k) int32.

    Returns:
        (m, k). No temporary is larger than an eighth of G, or than BLOCK_ELEMENTS.
    """
    num_rows, num_columns = rows.shape[1], cols.shape[1]
    num_blocks = min(MAX_BLOCKS, -(-num_rows * num_columns // BLOCK_ELEMENTS))
    size = -(-num_rows // num_blocks)
    is_sampled = columns.shape[1] <= SAMPLED_DENSITY * num_columns
    found = []
    for first in range(0, num_rows, size):
        block, picked = rows[:, first : first + size], columns[first : first + size].long()
        if is_sampled:
            sampled = cols.T.index_select(0, picked.reshape(-1)).view(*picked.shape, -1)
            found.append(torch.bmm(sampled, block.T.unsqueeze(2)).squeeze(2))
        else:
            found.append((block.T @ cols).gather(1, picked))
    return torch.cat(found) if len(found) > 1 else found[0]


def back_projection_at(low: Tensor, basis: Tensor, dim: ProjectedDim, columns: Tensor) -> Tensor:
    """``back_project(low)`` at some entries, by products of single entries in blocks of rows.

    Args:
        low: (m, r) for COLS, (r, n) for ROWS.
        basis: (n, r) or (m, r).
        dim: the projected dimension.
        columns: (m, k) int32.

    Returns:
        (m, k), the dtype of ``low``.
    """
    left, right = (low, basis) if dim is ProjectedDim.COLS else (basis, low.T)
    left, right = left.to(low.dtype), right.to(low.dtype)
    out = torch.empty(columns.shape, dtype=low.dtype, device=low.device)
    for rows in alike(list(row_blocks(columns.shape[0], columns.shape[1] * left.shape[1]))):
        picked = columns[rows].long()
        sampled = right.index_select(0, picked.reshape(-1)).view(*picked.shape, -1)
        out[rows] = torch.bmm(sampled, left[rows].unsqueeze(2)).squeeze(2)
    return out


def add_at_(weight: Tensor, columns: Tensor, values: Tensor) -> None:
    """``W[entries] += values`` in place.

    Args:
        weight: (m, n).
        columns: (m, k) int32.
        values: (m, k).
    """
    for rows in alike(list(row_blocks(columns.shape[0], 2 * columns.shape[1]))):
        weight[rows].scatter_add_(1, columns[rows].long(), values[rows].to(weight.dtype))


def entries_of(matrix: Tensor, columns: Tensor) -> Tensor:
    """The entries of a matrix (m, n): (m, k)."""
    return matrix.gather(1, columns.long())
