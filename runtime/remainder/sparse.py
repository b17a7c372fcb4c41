"""Entries of a projected weight trained at full rank: some columns of each block of rows, chosen in a warm-up.

    columns (b, k)   the entries: k columns in each of the b blocks of 64 rows
    Z (m, k)         a leaf without storage; its gradient is G at these entries

    rectified        the optimizer's step on G at the entries replaces the back-projected one there
    additive         E = G - back_project(R) at the entries; the optimizer's step on E is added there
    scaled           E itself is added there, scaled as the optimizer scales the rest: Fira's formula
                     (scaled.py) at some entries, without states and with gradients that accumulate

*Rectified* is equivalent to correcting the moments. The first moment is linear: the back-projected one plus the first
moment of E is the first moment of G while the basis stays, and remains correct when it changes. The second moment is
not linear and is kept for G.

The rows of a block share their columns for two reasons. G = dY^T X is large where a feature of X is large, in many rows
at once. And the entries of a block are then one small matrix product: they cost their share of the work of the full
gradient, and their indices need next to no memory. Freely chosen single entries cost more than the whole gradient at a
density of 0.02.

Choice of the columns: each update of the warm-up measures all k slots of a block. The half with the largest mean |E| is
kept for the next update, and a growing share in the last quarter of the warm-up. The other slots try the next columns
that are not kept, in turn. So no tensor of the weight's size is held, and every block ends with k different columns.
All columns have been tried after about 2.4 / density updates.

Source: GaLore+, Liao et al. 2024, arXiv:2412.19820 (sparsely coded residuals, indices learnt in a warm-up); the
variants, the blocks and the choice of columns are reconstructed, *scaled* is ours.
"""

import dataclasses
import functools
import math

import torch
from torch import Tensor

from galore_fx.runtime.subspace.projection import ProjectedDim, storage_free_leaf

# Rows of a block, which share their columns.
BLOCK_ROWS = 64
# Products are computed in parts of about PART_ELEMENTS / 8 entries, or an eighth of all entries if that is more: a
# compiled graph has at most eight such parts.
PART_ELEMENTS = 2**20
MAX_PARTS = 8
# Weight of a new measurement in the running mean; about the last seven count.
_WEIGHT_OF_NEW = 0.25
# A prime, so that neighbouring blocks start at distant columns.
_STRIDE = 7919


@dataclasses.dataclass(eq=False)
class SparseResidual:
    """The entries of one weight trained at full rank.

    Attributes:
        columns: (b, k) int32, distinct within each block; changed in place.
        leaf: Z, (m, k); its ``.grad`` is G at the entries.
        variant: rectified, additive or scaled.
        warm_up: number of updates in which the entries are learnt.
        scores: (b, k) float32, running mean of |E| of each slot, summed over the rows of its block; 0 before its first
            measurement; None after the warm-up.
        norm: for scaled, norm of the last applied S, 0-d float32; None for other variants.
    """

    columns: Tensor
    leaf: Tensor
    variant: str
    warm_up: int
    scores: Tensor | None = None
    norm: Tensor | None = None

    @classmethod
    def create(cls, weight: Tensor, density: float, *, variant: str, warm_up: int) -> "SparseResidual":
        """Creates evenly spread entries, which the warm-up replaces.

        Args:
            weight: the weight, (m, n).
            density: fraction of the entries of the weight.
            variant, warm_up: see the class.
        """
        num_rows, num_columns = weight.shape
        num_slots = num_entries(density, num_columns)
        steps = torch.arange(num_slots) * num_columns // num_slots
        starts = torch.arange(num_blocks(num_rows))[:, None] * _STRIDE
        columns = ((steps + starts) % num_columns).to(torch.int32).to(weight.device)
        residual = cls(columns, storage_free_leaf((num_rows, num_slots), weight), variant, warm_up)
        if variant == "scaled":
            residual.norm = torch.zeros((), device=weight.device)
        residual.set_learning(0)
        return residual

    def set_learning(self, num_updates: int) -> None:
        """Starts or ends the learning of the entries, according to the number of finished updates."""
        if num_updates >= self.warm_up:
            self.scores = None
        elif self.scores is None:
            self.scores = torch.zeros_like(self.columns, dtype=torch.float32)
            if self.norm is not None:
                self.norm = torch.zeros_like(self.norm)

    def add_gradient(self, grad: Tensor) -> None:
        """Adds the entries of a full gradient (m, n) to the gradient of the leaf."""
        entries = entries_of(grad, self.columns)
        self.leaf.grad = entries if self.leaf.grad is None else self.leaf.grad + entries

    @property
    def is_learning(self) -> bool:
        """Whether the entries are still being learnt; they do not update the weight then."""
        return self.scores is not None

    def learn(self, errors: Tensor, num_columns: int, num_updates: int) -> None:
        """Measures |E| of the slots, keeps the largest, and assigns other columns to the rest.

        Args:
            errors: E, (m, k).
            num_columns: n.
            num_updates: number of finished updates of the warm-up, without this one.
        """
        assert self.scores is not None
        num_slots = self.columns.shape[1]
        num_kept, num_tried = _contest(num_slots, self.warm_up)[num_updates]
        padded = torch.nn.functional.pad(errors.abs().float(), (0, 0, 0, -errors.shape[0] % BLOCK_ROWS))
        measured = padded.view(-1, BLOCK_ROWS, num_slots).sum(1)
        means = torch.where(self.scores > 0, self.scores.lerp(measured, _WEIGHT_OF_NEW), measured)
        kept = means.topk(num_kept, dim=1).indices
        columns = self.columns.gather(1, kept)
        starts = torch.arange(columns.shape[0], device=columns.device)[:, None] * _STRIDE + num_tried
        turns = (torch.arange(num_columns, device=columns.device) - starts) % num_columns
        turns.scatter_(1, columns.long(), num_columns)  # kept columns are not tried again
        tried = turns.topk(num_slots - num_kept, dim=1, largest=False).indices
        self.columns.copy_(torch.cat([columns, tried.to(torch.int32)], dim=1))
        self.scores.copy_(torch.cat([means.gather(1, kept), means.new_zeros(tried.shape)], dim=1))


@functools.lru_cache(maxsize=64)
def _contest(num_slots: int, warm_up: int) -> tuple[tuple[int, int], ...]:
    """Returns for each update of the warm-up the number of kept slots and of columns tried before.

    Half of the slots are kept; in the last quarter of the warm-up the number grows to all of them.
    """
    schedule, num_tried = [], 0
    for update in range(1, warm_up + 1):
        done = max(0.0, 4 * update / warm_up - 3)
        num_kept = max(1, math.floor(num_slots * (1 + done) / 2))
        schedule.append((num_kept, num_tried))
        num_tried += num_slots - num_kept
    return tuple(schedule)


def num_blocks(num_rows: int) -> int:
    """Returns the number of row blocks of a weight; the last may be smaller."""
    return -(-num_rows // BLOCK_ROWS)


def num_entries(density: float, num_columns: int) -> int:
    """Returns the number of entries of a row: at least two (one kept, one tried), at most ``num_columns``."""
    return min(num_columns, max(2, round(density * num_columns)))


def products_at(left: Tensor, right: Tensor, columns: Tensor) -> Tensor:
    """Returns ``left right^T`` at the entries, by a small matrix product for each block of rows.

    Args:
        left: (m, d).
        right: (n, d).
        columns: (b, k) int32.

    Returns:
        (m, k).
    """
    (num_rows, depth), (count, num_slots) = left.shape, columns.shape
    padded = torch.nn.functional.pad(left, (0, 0, 0, count * BLOCK_ROWS - num_rows))
    padded = padded.view(count, BLOCK_ROWS, depth)
    # Independent of the depth (the tokens of a batch), which may be symbolic.
    num_parts = min(MAX_PARTS, count, max(1, num_rows * num_slots * 8 // PART_ELEMENTS))
    size = -(-count // num_parts)
    found = []
    for first in range(0, count, size):
        picked = columns[first : first + size]
        # Gathers from the rows of X, each of which fits into a cache, instead of its columns.
        sampled = right.T.index_select(1, picked.reshape(-1)).view(depth, picked.shape[0], num_slots)
        found.append(torch.bmm(padded[first : first + size], sampled.transpose(0, 1)))
    whole = torch.cat(found) if len(found) > 1 else found[0]
    return whole.view(-1, num_slots)[:num_rows]


def gradient_at(rows: Tensor, cols: Tensor, columns: Tensor) -> Tensor:
    """Returns ``G = rows^T cols`` at the entries, without forming the rest.

    Args:
        rows: A, (t, m).
        cols: B, (t, n).
        columns: (b, k) int32.

    Returns:
        (m, k).
    """
    return products_at(rows.T, cols.T, columns)


def back_projection_at(low: Tensor, basis: Tensor, dim: ProjectedDim, columns: Tensor) -> Tensor:
    """Returns ``back_project(low)`` at the entries.

    Args:
        low: (m, r) for COLS, (r, n) for ROWS.
        basis: (n, r) or (m, r).
        dim: the projected dimension.
        columns: (b, k) int32.

    Returns:
        (m, k), in the dtype of ``low``.
    """
    left, right = (low, basis) if dim is ProjectedDim.COLS else (basis, low.T)
    return products_at(left.to(low.dtype), right.to(low.dtype), columns)


def entries_of(matrix: Tensor, columns: Tensor) -> Tensor:
    """Returns the entries (m, k) of a matrix (m, n)."""
    return matrix.gather(1, _by_row(columns, matrix.shape[0]))


def add_at_(weight: Tensor, columns: Tensor, values: Tensor) -> None:
    """Computes ``W[entries] += values`` in place, for values (m, k)."""
    weight.scatter_add_(1, _by_row(columns, weight.shape[0]), values.to(weight.dtype))


def add_in_rows_(change: Tensor, rows: slice, columns: Tensor, values: Tensor) -> None:
    """Adds values (rows, k) in place to a change (rows, n), at the entries of these rows of a weight."""
    change.scatter_add_(1, _in_rows(columns, rows), values.to(change.dtype))


def set_in_rows_(change: Tensor, rows: slice, columns: Tensor, values: Tensor) -> None:
    """Writes values (rows, k) into a change (rows, n), at the entries of these rows of a weight."""
    change.scatter_(1, _in_rows(columns, rows), values.to(change.dtype))


def _in_rows(columns: Tensor, rows: slice) -> Tensor:
    """Returns the columns of each of these rows, (rows, k) int64."""
    first = rows.start // BLOCK_ROWS
    blocks = columns[first : num_blocks(rows.stop)]
    return _by_row(blocks, rows.stop - first * BLOCK_ROWS)[rows.start - first * BLOCK_ROWS :]


def set_at_(weight: Tensor, columns: Tensor, values: Tensor) -> None:
    """Computes ``W[entries] <- values`` in place, for values (m, k)."""
    weight.scatter_(1, _by_row(columns, weight.shape[0]), values.to(weight.dtype))


def _by_row(columns: Tensor, num_rows: int) -> Tensor:
    """Returns the columns of each row, (m, k) int64."""
    count, num_slots = columns.shape
    by_block = columns.long()[:, None, :].expand(count, BLOCK_ROWS, num_slots)
    return by_block.reshape(-1, num_slots)[:num_rows]
