"""Exact bases of a full gradient: its leading singular vectors, of one side or both."""

from torch import Tensor

from galore_fx.recipes.recipe import Recipe
from galore_fx.runtime.subspace.bases import exact_bases, exact_basis
from galore_fx.runtime.subspace.basis_source import WIDE_BYTES, BasisSource, RefreshWork, WeightSize
from galore_fx.runtime.subspace.projection import ProjectedDim
from galore_fx.runtime.subspace.refresh_criteria import gradient_overlap


class ExactBasis(BasisSource):
    """Takes the leading singular vectors from LAPACK's or cuSOLVER's SVD.

    Source: GaLore, Zhao et al. 2024, arXiv:2403.03507, algorithm 2.
    """

    name = "svd"
    needs_full = True

    @classmethod
    def cost(cls, weight: WeightSize, recipe: Recipe) -> RefreshWork:
        """Returns the cost: G until the update; G, U, S, V in float32; 14 m n^2 + 8 n^3 operations, n the shorter side.

        Source: Golub, Van Loan, Matrix Computations, 4th edition, figure 8.6.1 (R-SVD with thin U).
        """
        long, short = max(weight.shape), min(weight.shape)
        kept = 0 if weight.is_factor else long * short * weight.element_bytes
        workspace = WIDE_BYTES * (2 * long * short + short * (short + 1))
        if recipe.residual == "scaled":  # G is formed only inside the backward
            kept, workspace = 0, workspace + kept
        return RefreshWork(kept, workspace, 14.0 * long * short**2 + 8.0 * short**3)

    def find(self, delivered: Tensor | None, basis: Tensor, dim: ProjectedDim) -> Tensor | None:
        """Returns the leading singular vectors of the projected side."""
        assert delivered is not None
        return exact_basis(delivered, basis.shape[1], dim)

    def overlap(self, delivered: Tensor | None, old: Tensor, new: Tensor, dim: ProjectedDim) -> float:
        """Returns the energy of the gradient in the old basis relative to the new one, corrected for chance."""
        assert delivered is not None
        return gradient_overlap(delivered, old, new, dim)


class ExactBases(ExactBasis):
    """Renews the bases of both sides; ``find`` replaces the column basis in place.

    Args:
        weight: (m, n).
        shape: shape of the row basis, (m, r).
        right_basis: the column basis, (n, r).
    """

    def __init__(self, weight: Tensor, shape: tuple[int, int], right_basis: Tensor) -> None:
        super().__init__(weight, shape)
        self._right_basis = right_basis

    def find(self, delivered: Tensor | None, basis: Tensor, dim: ProjectedDim) -> Tensor | None:
        """Returns the leading left singular vectors, after copying the right ones into the column basis."""
        assert delivered is not None
        bases = exact_bases(delivered, basis.shape[1])
        if bases is None:
            return None
        self._right_basis.copy_(bases[1])
        return bases[0]
