"""Sources of a weight's next basis: the common interface.

    window       output of the backward                            sources
    steady       R                                                 all
    refreshing   R, and the output of ``deliver``                  subspace iteration, drawn heads
                 G = A^T B itself                                  SVD (``needs_full``)
                 R                                                 those that look at no gradient

A source that recipes can select is one file: a subclass of ``BasisSource`` under a name that ``Recipe.basis`` lists.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from galore_fx.recipes.recipe import Recipe
from galore_fx.runtime.subspace.bases import random_basis
from galore_fx.runtime.subspace.projection import ProjectedDim, storage_free_leaf

WIDE_BYTES = 4


@dataclasses.dataclass(frozen=True)
class WeightSize:
    """Sizes of a projected weight that determine the cost of a refresh.

    Attributes:
        shape: (m, n).
        size: size of the projected dimension.
        rank: columns of R (rows for ROWS).
        element_bytes: bytes of one element of the weight.
        is_factor: whether the weight is a factor, whose small full gradient is always formed.
    """

    shape: tuple[int, int]
    size: int
    rank: int
    element_bytes: int
    is_factor: bool


@dataclasses.dataclass(frozen=True)
class RefreshWork:
    """Cost of renewing one basis.

    Attributes:
        kept_bytes: bytes that live from the backward to the update.
        workspace_bytes: bytes that live while the basis is computed.
        operations: floating-point operations of the factorisation.
    """

    kept_bytes: int
    workspace_bytes: int
    operations: float


class BasisSource:
    """Computes the next bases of one weight.

    Attributes:
        name: name of the source in ``Recipe.basis`` and in graphs.
        looks_at_gradient: whether the source uses the gradient of a refreshing window.
        needs_full: whether it needs the full gradient.
        leaf: a zero without storage; its ``.grad`` receives the output of ``deliver`` in a refreshing graph.
        key: seed of the draws of a refresh.

    Args:
        weight: the weight (m, n), for its dtype and device.
        shape: shape of the leaf.
        key: the first seed.
    """

    name: ClassVar[str]
    looks_at_gradient: ClassVar[bool] = True
    needs_full: ClassVar[bool] = False

    def __init__(self, weight: Tensor, shape: tuple[int, int], key: int = 0) -> None:
        self.leaf = storage_free_leaf(shape, weight)
        self.key = key

    @classmethod
    def create(cls, weight: Tensor, basis: Tensor, recipe: Recipe) -> "BasisSource":
        """Creates the source of a weight (m, n) with this first basis (size, r)."""
        return cls(weight, (basis.shape[0], basis.shape[1]))

    @staticmethod
    def first_basis(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Returns the basis (size, r), float32, that is used before the first refresh."""
        return random_basis(shape, generator)

    @classmethod
    def cost(cls, weight: WeightSize, recipe: Recipe) -> RefreshWork:
        """Returns the cost of a refresh, from shapes alone.

        Raises:
            NotImplementedError: a recipe cannot select this source.
        """
        raise NotImplementedError(f"the source {cls.name!r} has no cost: a recipe does not select it")

    @property
    def draws(self) -> bool:
        """Whether a refresh depends on random draws."""
        return False

    def draw(self, key: int) -> None:
        """Draws for the next window from a key; a resumed run and all ranks draw the same."""
        self.key = key

    def extra_inputs(self) -> dict[str, Tensor]:
        """Returns the inputs of a refreshing graph in addition to basis and leaf, by placeholder name."""
        return {}

    def graph_key(self) -> tuple[object, ...]:
        """Returns the properties that a refreshing graph depends on, in addition to the shape of the basis."""
        return ()

    def kept_tensors(self) -> list[Tensor]:
        """Returns the tensors that live through the step."""
        return [self.leaf, *self.extra_inputs().values()]

    @staticmethod
    def deliver(
        rows: Tensor, cols: Tensor, projected: Tensor, inputs: Mapping[str, Tensor], dim: ProjectedDim
    ) -> Tensor:
        """Computes the input of ``find`` inside a backward, from the factors of G.

        Args:
            rows: A, (t, m), of ``G = A^T B``.
            cols: B, (t, n).
            projected: R.
            inputs: the tensors of ``extra_inputs``.
            dim: the projected dimension.

        Returns:
            A tensor of the shape of the leaf.

        Raises:
            NotImplementedError: the source uses no gradient, or the full one.
        """
        raise NotImplementedError("this source takes nothing from the factors of a gradient")

    def from_full(self, grad: Tensor, basis: Tensor, dim: ProjectedDim) -> Tensor:
        """Computes the output of ``deliver`` from a full gradient (m, n); raises NotImplementedError like it."""
        raise NotImplementedError(f"the source {self.name!r} takes nothing from a full gradient")

    def find(self, delivered: Tensor | None, basis: Tensor, dim: ProjectedDim) -> Tensor | None:
        """Computes the new basis.

        Args:
            delivered: output of ``deliver`` or ``from_full``; G if ``needs_full``; None if no gradient is used.
            basis: the old basis, (size, r).
            dim: the projected dimension.

        Returns:
            (size, r), orthonormal; None on failure, so that the old basis stays.

        Raises:
            NotImplementedError: the source never renews a basis.
        """
        raise NotImplementedError(f"the source {self.name!r} renews no basis")

    def overlap(self, delivered: Tensor | None, old: Tensor, new: Tensor, dim: ProjectedDim) -> float:
        """Returns the share of ``delivered`` in the old subspace, corrected for chance: 1 is all, 0 chance level."""
        return 0.0


class SharedBasis(BasisSource):
    """Source of a weight that uses the basis of another weight; only the owner renews it."""

    name = "shared"
    looks_at_gradient = False
