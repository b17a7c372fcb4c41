"""Random bases, drawn anew at each refresh without a gradient."""

from torch import Tensor

from galore_fx.recipes.recipe import Recipe
from galore_fx.runtime.formats.counter_rng import generator_of
from galore_fx.runtime.subspace.bases import random_basis
from galore_fx.runtime.subspace.basis_source import WIDE_BYTES, BasisSource, RefreshWork, WeightSize
from galore_fx.runtime.subspace.projection import ProjectedDim


class RandomBasis(BasisSource):
    """Draws orthonormalised Gaussian columns, seeded by the update count and the index of the weight."""

    name = "random"
    looks_at_gradient = False
    draws = True

    @classmethod
    def cost(cls, weight: WeightSize, recipe: Recipe) -> RefreshWork:
        """Returns the cost: nothing until the update, the basis in float32, and 4 size r^2 operations, of one part."""
        parts = recipe.granularity_in_force((weight.size, weight.rank))
        size, rank = weight.size // parts, weight.rank // parts
        return RefreshWork(0, WIDE_BYTES * size * rank, 4.0 * size * rank**2)

    def find(self, delivered: Tensor | None, basis: Tensor, dim: ProjectedDim) -> Tensor | None:
        """Draws a new basis from the key."""
        return random_basis((basis.shape[0], basis.shape[1]), generator_of(self.key)).to(basis.device)
