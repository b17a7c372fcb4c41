"""Some heads of an attention weight, drawn anew at each refresh, whose gradient gives the basis for all of them.

    G (heads * size, n)  ->  G[features] (k, n), k = ceil(rank / size) heads  ->  basis (n, rank)

The heads of a layer's queries, and of its keys, have similar row spaces; so the basis is found in O(size^2 n) for one
of them, and not in O((heads * size)^2 n) for all.

Source: GaLore+, Liao et al. 2024, arXiv:2412.19820: "the projection from one randomly selected head is shared". What is
reconstructed here: a basis of its own for queries and for keys, a new head at each refresh, several heads where the
rank exceeds a head's size, the query, key and value rows of a head together where they are one weight.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from galore_fx.runtime.formats.counter_rng import generator_of
from galore_fx.runtime.subspace.bases import exact_basis, orthonormalize
from galore_fx.runtime.subspace.basis_source import BasisSource
from galore_fx.runtime.subspace.projection import ProjectedDim
from galore_fx.runtime.subspace.refresh_criteria import gradient_overlap


class SampledHeads:
    """The heads of one weight, and those that are drawn now.

    Attributes:
        features: (k,) int64, features of the drawn heads; changed in place.

    Args:
        heads: the features of each head, all of the same number.
        rank: columns of the basis.
        device: of the weight.
    """

    def __init__(self, heads: tuple[tuple[int, ...], ...], rank: int, device: torch.device) -> None:
        self._heads = torch.tensor(heads, dtype=torch.int64)
        self.num_drawn = -(-rank // self._heads.shape[1])
        if self.num_drawn > len(heads):
            raise ValueError(
                f"{len(heads)} heads of {self._heads.shape[1]} features cannot give a basis of rank {rank}"
            )
        self.features = torch.empty(self.num_drawn * self._heads.shape[1], dtype=torch.int64, device=device)

    def draw(self, key: int) -> None:
        """Takes heads that follow from a number: the same in a resumed run and on every rank."""
        generator = generator_of(key)
        drawn = torch.randperm(self._heads.shape[0], generator=generator)[: self.num_drawn]
        self.features.copy_(self._heads[drawn.sort().values].flatten())

    def gradient_shape(self, shape: tuple[int, int], dim: ProjectedDim) -> tuple[int, int]:
        """Of the drawn heads' gradient: (k, n) where the columns are projected, (m, k) where the rows are."""
        num_features = self.features.shape[0]
        return (num_features, shape[1]) if dim is ProjectedDim.COLS else (shape[0], num_features)


def gradient_of_heads(rows: Tensor, cols: Tensor, features: Tensor, dim: ProjectedDim) -> Tensor:
    """The part of ``G = rows^T cols`` that belongs to some features, without forming the rest.

    Args:
        rows: A, (t, m).
        cols: B, (t, n).
        features: (k,), of the dimension that is not projected.
        dim: the projected dimension.

    Returns:
        (k, n) for COLS, (m, k) for ROWS.
    """
    if dim is ProjectedDim.COLS:
        return rows.index_select(1, features).T @ cols
    return rows.T @ cols.index_select(1, features)


def basis_of_heads(grad: Tensor, rank: int, dim: ProjectedDim) -> Tensor | None:
    """The leading singular vectors of the drawn heads' gradient, by its small Gram matrix.

    An eigenvector has no sign: each is given the one that makes its largest component positive, so that moments which
    are kept meet the directions of before with the signs of before, wherever the same directions come again.

    Args:
        grad: (k, n) for COLS, (m, k) for ROWS, with k >= rank.
        rank: columns of the basis.
        dim: the projected dimension.

    Returns:
        (n, r) or (m, r), orthonormal, float32; None where the gradient is not finite or zero.
    """
    wide = grad.float() if dim is ProjectedDim.COLS else grad.float().T
    gram = wide @ wide.T
    if not bool(torch.isfinite(torch.linalg.vector_norm(gram))):
        return None
    try:
        _, vectors = torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return exact_basis(grad, rank, dim)
    leading = wide.T @ vectors[:, -rank:].flip(1)
    largest = leading.gather(0, leading.abs().argmax(0, keepdim=True))
    return orthonormalize(leading * largest.sign())


class HeadBasis(BasisSource):
    """The basis of all heads, from the gradient of some that are drawn.

    Attributes:
        heads: of the weight, and those that are drawn now.

    Args:
        weight: (m, n).
        heads: the features of each head.
        rank: columns of the basis.
        dim: the projected dimension.
        key: says which heads are drawn first.
    """

    name = "heads"
    draws = True

    def __init__(
        self, weight: Tensor, heads: tuple[tuple[int, ...], ...], rank: int, dim: ProjectedDim, key: int
    ) -> None:
        self.heads = SampledHeads(heads, rank, weight.device)
        super().__init__(weight, self.heads.gradient_shape((weight.shape[0], weight.shape[1]), dim))
        self.draw(key)

    def draw(self, key: int) -> None:
        """Other heads."""
        super().draw(key)
        self.heads.draw(key)

    def extra_inputs(self) -> dict[str, Tensor]:
        """The features of the drawn heads."""
        return {"head_features": self.heads.features}

    def graph_key(self) -> tuple[object, ...]:
        """How many heads are drawn."""
        return (self.heads.num_drawn,)

    @staticmethod
    def deliver(
        rows: Tensor, cols: Tensor, projected: Tensor, inputs: Mapping[str, Tensor], dim: ProjectedDim
    ) -> Tensor:
        """The part of G that belongs to the drawn heads, (k, n) for COLS, (m, k) for ROWS."""
        return gradient_of_heads(rows, cols, inputs["head_features"], dim)

    def from_full(self, grad: Tensor, basis: Tensor, dim: ProjectedDim) -> Tensor:
        """The same part."""
        return grad.index_select(0 if dim is ProjectedDim.COLS else 1, self.heads.features)

    def find(self, delivered: Tensor | None, basis: Tensor, dim: ProjectedDim) -> Tensor | None:
        """The leading singular vectors of that part."""
        assert delivered is not None
        return basis_of_heads(delivered, basis.shape[1], dim)

    def overlap(self, delivered: Tensor | None, old: Tensor, new: Tensor, dim: ProjectedDim) -> float:
        """The energy of that part in the old basis by that in the new one."""
        assert delivered is not None
        return gradient_overlap(delivered, old, new, dim)
