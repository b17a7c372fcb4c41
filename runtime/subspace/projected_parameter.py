"""Weights trained in a subspace, and the registry that maps a parameter to its record.

    forward of a region     weight W (m, n), basis P, leaf Z (no storage)   ->  Y
    backward of a region    dY                                             ->  dX, Z.grad = R

``Z`` is a zero with the shape of the projected gradient, expanded from one element, so it needs next to no memory.
Autograd accumulates the projected gradient in its ``.grad``, over uses and micro-batches.
"""

import dataclasses
import enum
import weakref
from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from galore_fx.runtime.foreign_hooks import has_gradient_hooks
from galore_fx.runtime.subspace.basis_iteration import IteratedBasis
from galore_fx.runtime.subspace.basis_source import BasisSource, SharedBasis
from galore_fx.runtime.subspace.projection import ProjectedDim, project, storage_free_leaf


class GradientForm(enum.Enum):
    """Form in which the next backward delivers the gradient of a weight."""

    PROJECTED = "projected"
    """R as ``leaf.grad``: the steady state."""
    REFRESHING = "refreshing"
    """R, and in ``source.leaf.grad`` the output of the basis source: a sketch, or the gradient of the drawn heads."""
    CONSUMED = "consumed"
    """The weight is updated inside the backward graph, from dY and X; the gradient that leaves it is not used."""
    FULL = "full"
    """G as ``weight.grad``: for an exact SVD, and where the full gradient is needed but cannot be consumed."""


class TrainedEntries(Protocol):
    """Interface of the entries trained in addition to the projection (``remainder.sparse.SparseResidual``)."""

    columns: Tensor
    leaf: Tensor
    variant: str
    scores: Tensor | None
    norm: Tensor | None

    @property
    def is_learning(self) -> bool: ...

    def set_learning(self, num_updates: int) -> None: ...

    def learn(self, errors: Tensor, num_columns: int, num_updates: int) -> None: ...

    def add_gradient(self, grad: Tensor) -> None: ...


@dataclasses.dataclass(eq=False)
class ProjectedParameter:
    """Record of one projected weight.

    Attributes:
        name: qualified name in the model.
        weight: the parameter, (m, n).
        dim: the projected dimension.
        rank: columns of R (rows for ROWS): the columns of the basis times the granularity.
        basis: (m, r) for ROWS, (n, r) for COLS, or the basis of one part (runtime/subspace/projection.py); the dtype
            of the weight; changed in place, and replaced only by ``share_basis``.
        leaf: Z, (r, n) for ROWS, (m, r) for COLS; its ``.grad`` is R.
        source: source of the next basis.
        form: gradient form that the next forward prepares.
        shared_roles: roles whose heads share a basis ("query", ...), if the graph shows such heads in this weight.
        shares_basis: whether the weights of these roles with the same input share one basis; cleared at the end of the
            first window if the weight has its own basis and no drawn heads.
        basis_owner: record whose basis this weight uses; None for its own basis.
        residual: the entries trained at full rank in addition; None for none.
        source_hook: called with the leaf of the source when its ``.grad`` is complete.
        first_direction: the first unit projected gradient after a new basis, if the refresh criterion needs it.
        complement_norm: norm of the last scaled residual of all entries, 0-d float32; None without one.
        consumes: whether the backward graph passes A and B of ``G = A^T B`` to the update.
        consume: performs this update and returns a tensor of the shape of R.
        num_uses: forward runs of such a graph in this window.
        delivers_full: whether every backward delivers the full gradient, because it is small (a factor's).
        right_basis: the column basis (n, r) if both sides are projected; ``basis`` is then the row basis, and R is
            (r, r).
    """

    name: str
    weight: nn.Parameter
    dim: ProjectedDim
    rank: int
    basis: Tensor
    leaf: Tensor
    source: BasisSource
    form: GradientForm = GradientForm.PROJECTED
    shared_roles: frozenset[str] = frozenset()
    shares_basis: bool = False
    basis_owner: "ProjectedParameter | None" = None
    residual: TrainedEntries | None = None
    source_hook: Callable[[Tensor], None] | None = None
    first_direction: Tensor | None = None
    complement_norm: Tensor | None = None
    consumes: bool = False
    consume: Callable[[Tensor, Tensor], Tensor] | None = None
    num_uses: int = 0
    delivers_full: bool = False
    right_basis: Tensor | None = None

    @classmethod
    def create(
        cls,
        name: str,
        weight: nn.Parameter,
        dim: ProjectedDim,
        rank: int,
        basis: Tensor,
        source: BasisSource | None = None,
    ) -> "ProjectedParameter":
        """Creates a record with a new leaf for an existing basis; ``source`` defaults to subspace iteration."""
        shape = (weight.shape[0], weight.shape[1])
        leaf = storage_free_leaf(dim.projected_shape(shape, rank), weight)
        return cls(name, weight, dim, rank, basis, leaf, source or IteratedBasis(weight, basis))

    def graph_key(self, form: GradientForm) -> tuple[object, ...]:
        """Returns the properties of this record on which a graph compiled for this form depends."""
        refreshing = (self.source.name, self.source.graph_key()) if form is GradientForm.REFRESHING else None
        num_entries = self.residual.columns.shape[1] if self.residual is not None else 0
        bits = getattr(self.basis, "bits", None)
        return (self.dim, self.basis.shape, form, self.basis.dtype, bits, num_entries, refreshing)

    def graph_inputs(self, form: GradientForm) -> dict[str, Tensor]:
        """Returns the inputs of a graph of this form for this weight, in the order of its extra placeholders."""
        if form is GradientForm.FULL:
            return {}
        if form is GradientForm.CONSUMED:
            return {"leaf": self.leaf}
        inputs = {"basis": self.basis, "leaf": self.leaf}
        if form is GradientForm.REFRESHING:
            inputs |= {"source_leaf": self.source.leaf, **self.source.extra_inputs()}
        if self.residual is not None:
            inputs["residual_leaf"], inputs["residual_columns"] = self.residual.leaf, self.residual.columns
        return inputs

    def gradient_leaves(self) -> list[Tensor]:
        """Returns the leaves whose gradients an update needs."""
        return [self.leaf] if self.residual is None else [self.leaf, self.residual.leaf]

    def kept_tensors(self) -> list[Tensor]:
        """Returns the tensors that this record holds through the step, except the weight."""
        right = [self.right_basis] if self.right_basis is not None else []
        return [self.basis, *self.source.kept_tensors(), *self.gradient_leaves(), *right]

    def take_source(self, source: BasisSource) -> None:
        """Replaces the source of the next basis, from the current window on."""
        is_due = self.form is self.form_of(due=True) and not self.wants_full_gradient
        self.source = source
        if self.source_hook is not None:
            source.leaf.register_post_accumulate_grad_hook(self.source_hook)
        if is_due:
            self.form = self.form_of(due=True)

    def share_basis(self, owner: "ProjectedParameter") -> None:
        """Uses the basis of another weight from now on; only the owner renews it."""
        self.basis_owner, self.basis, self.shared_roles = owner, owner.basis, frozenset()
        self.take_source(SharedBasis(self.weight, (self.basis.shape[0], self.basis.shape[1])))
        if not self.wants_full_gradient:
            self.form = GradientForm.PROJECTED

    def draw(self, key: int) -> None:
        """Draws for the next window; also stores the key for heads that a graph may recognise later."""
        if self.shared_roles or self.source.draws:
            self.source.draw(key)

    @property
    def residual_is_scaled(self) -> bool:
        """Whether the residual entries are trained without optimizer states."""
        return self.residual is not None and self.residual.variant == "scaled"

    @property
    def is_underway(self) -> bool:
        """Whether a gradient has been projected in this window; basis and form are then fixed until its end."""
        return self.leaf.grad is not None

    @property
    def is_hooked(self) -> bool:
        """Whether the weight has gradient hooks, which require the full gradient."""
        return has_gradient_hooks(self.weight)

    @property
    def wants_full_gradient(self) -> bool:
        """Whether every backward needs the full gradient."""
        return self.complement_norm is not None or self.delivers_full

    def stop_consuming(self) -> None:
        """Makes the backward deliver G from now on instead of consuming it."""
        self.consumes, self.form = False, GradientForm.FULL

    def form_of(self, *, due: bool) -> GradientForm:
        """Returns the form that the next backward should deliver, depending on whether the basis is due."""
        if self.wants_full_gradient:
            return GradientForm.CONSUMED if self.consumes else GradientForm.FULL
        if not due or not self.source.looks_at_gradient:
            return GradientForm.PROJECTED
        return GradientForm.FULL if self.source.needs_full else GradientForm.REFRESHING

    def project(self, value: Tensor) -> Tensor:
        """Returns the coordinates of a tensor of the weight's shape: R for a gradient."""
        projected = project(value, self.basis, self.dim)
        return projected if self.right_basis is None else projected @ self.right_basis

    def project_both_sides(self, right_basis: Tensor) -> None:
        """Projects the columns too, with this basis (n, r). Must precede any other use of the record."""
        self.right_basis = right_basis
        self.leaf = storage_free_leaf((self.rank, self.rank), self.weight)

    def clear(self) -> None:
        """Clears the gradients in all their forms."""
        for holder in (*self.gradient_leaves(), self.source.leaf, self.weight):
            holder.grad = None


class ParameterRegistry:
    """Maps the identity of a weight to its projected parameter.

    The records are kept outside the Parameter, because ``.to()`` loses its attributes and deepcopy copies them. The
    registry holds its records weakly: they live as long as the compiled model that created them. Each record keeps its
    weight alive, so the identity stays valid.
    """

    def __init__(self) -> None:
        self._records: weakref.WeakValueDictionary[int, ProjectedParameter] = weakref.WeakValueDictionary()

    def add(self, record: ProjectedParameter) -> None:
        """Registers ``record`` for its weight."""
        self._records[id(record.weight)] = record

    def get(self, weight: object) -> ProjectedParameter | None:
        """Returns the record of a weight; None if it is not projected."""
        return self._records.get(id(weight))


# One per process: a compiled region looks up the records of the weights that it is called with.
REGISTRY = ParameterRegistry()
