"""Bases of attention weights from the gradient of a few heads, drawn anew at each refresh and shared by all heads.

    G (heads * size, n)  ->  G[features] (k, n) of ceil(rank / size) heads  ->  basis (n, rank)

The query heads of a layer have similar row spaces, and so have its key heads. One head gives the basis in O(size^2 n)
instead of O((heads * size)^2 n) for all heads.

Source: GaLore+, Liao et al. 2024, arXiv:2412.19820: "the projection from one randomly selected head is shared". These
points are our reconstruction: separate bases for queries and keys, a new head at each refresh, several heads if the
rank exceeds the head size, and the query, key and value rows of a head together if they are one weight.
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
    """The heads of one weight and the current draw.

    Attributes:
        num_drawn: number of drawn heads.
        features: (k,) int64, features of the drawn heads; changed in place.

    Args:
        heads: the features of each head; all heads have the same number.
        rank: columns of the basis.
        device: device of the weight.

    Raises:
        ValueError: all heads together have fewer features than the rank.
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
        """Draws heads from a key; a resumed run and all ranks draw the same heads."""
        generator = generator_of(key)
        drawn = torch.randperm(self._heads.shape[0], generator=generator)[: self.num_drawn]
        self.features.copy_(self._heads[drawn.sort().values].flatten())

    def gradient_shape(self, shape: tuple[int, int], dim: ProjectedDim) -> tuple[int, int]:
        """Returns the shape of the drawn heads' gradient: (k, n) for COLS, (m, k) for ROWS."""
        num_features = self.features.shape[0]
        return (num_features, shape[1]) if dim is ProjectedDim.COLS else (shape[0], num_features)


def gradient_of_heads(rows: Tensor, cols: Tensor, features: Tensor, dim: ProjectedDim) -> Tensor:
    """Returns the part of ``G = rows^T cols`` that belongs to some features, without forming the rest.

    Args:
        rows: A, (t, m).
        cols: B, (t, n).
        features: (k,), indices in the dimension that is not projected.
        dim: the projected dimension.

    Returns:
        (k, n) for COLS, (m, k) for ROWS.
    """
    if dim is ProjectedDim.COLS:
        return rows.index_select(1, features).T @ cols
    return rows.T @ cols.index_select(1, features)


def basis_of_heads(grad: Tensor, rank: int, dim: ProjectedDim) -> Tensor | None:
    """Returns the leading singular vectors of the drawn heads' gradient, by its small Gram matrix.

    The sign of an eigenvector is arbitrary; here the largest component is made positive. A direction that recurs at
    the next refresh thus keeps its sign, as kept moments require.

    Args:
        grad: (k, n) for COLS, (m, k) for ROWS, with k >= rank.
        rank: columns of the basis.
        dim: the projected dimension.

    Returns:
        (n, r) or (m, r), orthonormal, float32 (the dtype of the gradient if the eigendecomposition fails and the
        exact SVD is used). None if the gradient is not finite or zero.
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
    """Computes the basis of all heads from the gradient of the drawn heads.

    Attributes:
        heads: the heads of the weight and the current draw.

    Args:
        weight: (m, n).
        heads: the features of each head.
        rank: columns of the basis.
        dim: the projected dimension.
        key: key of the first draw.

    Raises:
        ValueError: all heads together have fewer features than the rank.
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
        """Draws other heads."""
        super().draw(key)
        self.heads.draw(key)

    def extra_inputs(self) -> dict[str, Tensor]:
        """Returns the features of the drawn heads."""
        return {"head_features": self.heads.features}

    def graph_key(self) -> tuple[object, ...]:
        """Returns the number of drawn heads."""
        return (self.heads.num_drawn,)

    @staticmethod
    def deliver(
        rows: Tensor, cols: Tensor, projected: Tensor, inputs: Mapping[str, Tensor], dim: ProjectedDim
    ) -> Tensor:
        """Returns the part of G that belongs to the drawn heads, (k, n) for COLS, (m, k) for ROWS."""
        return gradient_of_heads(rows, cols, inputs["head_features"], dim)

    def from_full(self, grad: Tensor, basis: Tensor, dim: ProjectedDim) -> Tensor:
        """Selects the same part from a full gradient."""
        return grad.index_select(0 if dim is ProjectedDim.COLS else 1, self.heads.features)

    def find(self, delivered: Tensor | None, basis: Tensor, dim: ProjectedDim) -> Tensor | None:
        """Returns the leading singular vectors of that part."""
        assert delivered is not None
        return basis_of_heads(delivered, basis.shape[1], dim)

    def overlap(self, delivered: Tensor | None, old: Tensor, new: Tensor, dim: ProjectedDim) -> float:
        """Returns the energy of that part in the old basis relative to the new one, corrected for chance."""
        assert delivered is not None
        return gradient_overlap(delivered, old, new, dim)
