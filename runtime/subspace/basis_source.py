"""Where the next basis of a weight comes from: what every source can be asked, and the sources by name.

    window       what the backward delivers                        sources
    steady       R                                                 all
    refreshing   R, and what ``deliver`` makes of A and B          subspace iteration, drawn heads
                 G = A^T B itself                                  SVD (``needs_full``)
                 R                                                 those that look at no gradient

A source is one file: a subclass of ``BasisSource`` under a name that ``Recipe.basis`` lists.
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
    """A projected weight as the cost of a refresh depends on it.

    Attributes:
        shape: (m, n).
        size: of the projected dimension.
        rank: columns of R, or its rows.
        element_bytes: of one element of the weight.
        is_factor: whether it is a factor, whose gradient is small and comes in full anyway.
    """

    shape: tuple[int, int]
    size: int
    rank: int
    element_bytes: int
    is_factor: bool


@dataclasses.dataclass(frozen=True)
class RefreshWork:
    """What renewing one basis takes.

    Attributes:
        kept_bytes: alive from the backward to the update.
        workspace_bytes: alive while the basis is found.
        operations: of the factorisation.
    """

    kept_bytes: int
    workspace_bytes: int
    operations: float


class BasisSource:
    """The next bases of one weight.

    Attributes:
        name: of the source, in ``Recipe.basis`` and in graphs.
        looks_at_gradient: whether a refreshing window delivers anything for it.
        needs_full: whether that is the full gradient.
        leaf: a zero without storage; its ``.grad`` is what a refreshing graph delivers.
        key: the number from which a refresh draws what it draws.

    Args:
        weight: the weight (m, n), for its dtype and device.
        shape: of what a refreshing graph delivers.
        key: the same.
    """

    name: ClassVar[str]
    looks_at_gradient: ClassVar[bool] = True
    needs_full: ClassVar[bool] = False

    def __init__(self, weight: Tensor, shape: tuple[int, int], key: int = 0) -> None:
        self.leaf = storage_free_leaf(shape, weight)
        self.key = key

    @classmethod
    def create(cls, weight: Tensor, basis: Tensor, recipe: Recipe) -> "BasisSource":
        """The source of a weight (m, n) with this first basis (size, r)."""
        return cls(weight, (basis.shape[0], basis.shape[1]))

    @staticmethod
    def first_basis(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        """The basis (size, r) before the first refresh, float32."""
        return random_basis(shape, generator)

    @classmethod
    def cost(cls, weight: WeightSize, recipe: Recipe) -> RefreshWork:
        """What a refresh takes, from shapes alone."""
        raise NotImplementedError

    @property
    def draws(self) -> bool:
        """Whether a refresh takes something that is drawn."""
        return False

    def draw(self, key: int) -> None:
        """Draws for the next window what follows from a number, the same in a resumed run and on every rank."""
        self.key = key

    def extra_inputs(self) -> dict[str, Tensor]:
        """What a refreshing graph takes besides the basis and the leaf, by the name of its placeholder."""
        return {}

    def graph_key(self) -> tuple[object, ...]:
        """What a refreshing graph depends on besides the shape of the basis."""
        return ()

    def kept_tensors(self) -> list[Tensor]:
        """What lives through the step."""
        return [self.leaf, *self.extra_inputs().values()]

    @staticmethod
    def deliver(
        rows: Tensor, cols: Tensor, projected: Tensor, inputs: Mapping[str, Tensor], dim: ProjectedDim
    ) -> Tensor:
        """What the next basis is found from, made inside a backward from the factors of G.

        Args:
            rows: A, (t, m), of ``G = A^T B``.
            cols: B, (t, n).
            projected: R.
            inputs: those of ``extra_inputs``.
            dim: the projected dimension.

        Returns:
            Of the leaf's shape.
        """
        raise NotImplementedError

    def from_full(self, grad: Tensor, basis: Tensor, dim: ProjectedDim) -> Tensor:
        """What ``deliver`` would make, from a full gradient (m, n)."""
        raise NotImplementedError

    def find(self, delivered: Tensor | None, basis: Tensor, dim: ProjectedDim) -> Tensor | None:
        """The new basis.

        Args:
            delivered: what ``deliver`` or ``from_full`` made; G where ``needs_full``; None where no gradient counts.
            basis: the old one, (size, r).
            dim: the projected dimension.

        Returns:
            (size, r), orthonormal; None where there is none, so that the old one stays.
        """
        raise NotImplementedError

    def overlap(self, delivered: Tensor | None, old: Tensor, new: Tensor, dim: ProjectedDim) -> float:
        """How much of what was delivered the old basis still held, corrected for chance: 1 all, 0 none."""
        return 0.0


class SharedBasis(BasisSource):
    """No source of its own: the basis is that of another weight, which alone renews it."""

    name = "shared"
    looks_at_gradient = False
