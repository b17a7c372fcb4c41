"""Subspace iteration from the old basis: one more product in a refreshing backward, without the full gradient."""

from collections.abc import Mapping

import torch
from torch import Tensor

from galore_fx.recipes.recipe import Recipe
from galore_fx.runtime.formats.counter_rng import generator_of
from galore_fx.runtime.subspace.bases import leading_columns, orthonormalize, sketch, sketch_of
from galore_fx.runtime.subspace.basis_source import WIDE_BYTES, BasisSource, RefreshWork, WeightSize
from galore_fx.runtime.subspace.projection import ProjectedDim, projected_gradient
from galore_fx.runtime.subspace.refresh_criteria import sketch_overlap


class IteratedBasis(BasisSource):
    """Renews a basis by one subspace iteration on the old basis and optional random columns.

    Source: Halko, Martinsson, Tropp 2011, SIAM Rev. 53(2), algorithm 4.4 and section 4.2.

    Attributes:
        columns: E, (size, p), the random columns; None if p is 0.

    Args:
        weight: (m, n).
        basis: the first basis, (size, r).
        num_columns: p, number of random columns sketched in addition to the basis.
    """

    name = "subspace-iteration"

    def __init__(self, weight: Tensor, basis: Tensor, num_columns: int = 0) -> None:
        size, rank = basis.shape
        super().__init__(weight, (size, rank + num_columns))
        self.columns: Tensor | None = None
        if num_columns:
            self.columns = torch.empty((size, num_columns), dtype=self.leaf.dtype, device=self.leaf.device)

    @classmethod
    def create(cls, weight: Tensor, basis: Tensor, recipe: Recipe) -> "IteratedBasis":
        """Creates the source with the oversampling of the recipe, limited to the size of the projected dimension."""
        size, rank = basis.shape
        return cls(weight, basis, min(recipe.oversampling, size - rank))

    @classmethod
    def cost(cls, weight: WeightSize, recipe: Recipe) -> RefreshWork:
        """Returns the cost: the sketch until the update, three float32 sketches, and 9 size (r + p)^2 operations.

        Each of the three passes of Cholesky QR takes 2 size r^2 for the Gram matrix and size r^2 for the solve.
        """
        columns = min(weight.rank + recipe.oversampling, weight.size)
        sketched = weight.size * columns
        return RefreshWork(sketched * weight.element_bytes, 3 * WIDE_BYTES * sketched, 9.0 * sketched * columns)

    @property
    def draws(self) -> bool:
        """Whether there are random columns."""
        return self.columns is not None

    def draw(self, key: int) -> None:
        """Draws other random columns."""
        super().draw(key)
        if self.columns is not None:
            shape = self.columns.shape
            self.columns.copy_(torch.randn(shape, generator=generator_of(key)).mul_(shape[0] ** -0.5))

    def extra_inputs(self) -> dict[str, Tensor]:
        """Returns the random columns, if any."""
        return {} if self.columns is None else {"sketch_columns": self.columns}

    def graph_key(self) -> tuple[object, ...]:
        """Returns the number of random columns."""
        return (0 if self.columns is None else self.columns.shape[1],)

    @staticmethod
    def deliver(
        rows: Tensor, cols: Tensor, projected: Tensor, inputs: Mapping[str, Tensor], dim: ProjectedDim
    ) -> Tensor:
        """Returns the sketch ``G^T G [P, E]`` (n, r + p) for COLS, ``G G^T [P, E]`` (m, r + p) for ROWS."""
        if "sketch_columns" in inputs:
            extra = projected_gradient(rows, cols, inputs["sketch_columns"], dim)
            projected = torch.cat([projected, extra], dim=0 if dim is ProjectedDim.ROWS else 1)
        return sketch(rows, cols, projected, dim)

    def from_full(self, grad: Tensor, basis: Tensor, dim: ProjectedDim) -> Tensor:
        """Returns the same sketch from a full gradient."""
        start = basis if self.columns is None else torch.cat([basis, self.columns], dim=1)
        return sketch_of(grad, start, dim)

    def find(self, delivered: Tensor | None, basis: Tensor, dim: ProjectedDim) -> Tensor | None:
        """Returns orthonormal columns with the span of the sketch, or of its leading directions if oversampled."""
        assert delivered is not None
        return orthonormalize(delivered if self.columns is None else leading_columns(delivered, basis.shape[1]))

    def overlap(self, delivered: Tensor | None, old: Tensor, new: Tensor, dim: ProjectedDim) -> float:
        """Returns the share of the sketch's energy in the span of the old basis, corrected for chance."""
        assert delivered is not None
        return sketch_overlap(old, delivered)
