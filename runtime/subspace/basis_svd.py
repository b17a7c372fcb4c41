"""The exact basis of a full gradient: the leading singular vectors, of one side or of both."""

from torch import Tensor

from galore_fx.recipes.recipe import Recipe
from galore_fx.runtime.subspace.bases import exact_bases, exact_basis
from galore_fx.runtime.subspace.basis_source import WIDE_BYTES, BasisSource, RefreshWork, WeightSize
from galore_fx.runtime.subspace.projection import ProjectedDim
from galore_fx.runtime.subspace.refresh_criteria import gradient_overlap


class ExactBasis(BasisSource):
    """The singular vectors by LAPACK's or cuSOLVER's SVD.

    Source: GaLore, Zhao et al. 2024, arXiv:2403.03507, algorithm 2.
    """

    name = "svd"
    needs_full = True

    @classmethod
    def cost(cls, weight: WeightSize, recipe: Recipe) -> RefreshWork:
        """G until the update; G, U, S, V in float32; 14 m n^2 + 8 n^3 operations, n the shorter side.

        Source: Golub, Van Loan, Matrix Computations, 4th edition, figure 8.6.1 (R-SVD with thin U).
        """
        long, short = max(weight.shape), min(weight.shape)
        kept = 0 if weight.is_factor else long * short * weight.element_bytes
        workspace = WIDE_BYTES * (2 * long * short + short * (short + 1))
        if recipe.residual == "scaled":  # formed for itself, in the backward
            kept, workspace = 0, workspace + kept
        return RefreshWork(kept, workspace, 14.0 * long * short**2 + 8.0 * short**3)

    def find(self, delivered: Tensor | None, basis: Tensor, dim: ProjectedDim) -> Tensor | None:
        """The leading vectors of the projected side."""
        assert delivered is not None
        return exact_basis(delivered, basis.shape[1], dim)

    def overlap(self, delivered: Tensor | None, old: Tensor, new: Tensor, dim: ProjectedDim) -> float:
        """The energy of the gradient in the old basis by that in the new one."""
        assert delivered is not None
        return gradient_overlap(delivered, old, new, dim)


class ExactBases(ExactBasis):
    """The same for both sides; the basis of the columns is exchanged in place as soon as it is found.

    Args:
        weight: (m, n).
        shape: of the basis of the rows, (m, r).
        right_basis: that of the columns, (n, r).
    """

    def __init__(self, weight: Tensor, shape: tuple[int, int], right_basis: Tensor) -> None:
        super().__init__(weight, shape)
        self._right_basis = right_basis

    def find(self, delivered: Tensor | None, basis: Tensor, dim: ProjectedDim) -> Tensor | None:
        """The leading left vectors; the right ones are in place by then."""
        assert delivered is not None
        bases = exact_bases(delivered, basis.shape[1])
        if bases is None:
            return None
        self._right_basis.copy_(bases[1])
        return bases[0]
