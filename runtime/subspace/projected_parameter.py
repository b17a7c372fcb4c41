"""A weight that is trained in a subspace, and the registry that finds it from the parameter itself.

    forward of a region     weight W (m, n), basis P, leaf Z (no storage)   ->  Y
    backward of a region    dY                                             ->  dX, Z.grad = R

``Z`` is a zero with the projected gradient's shape that is expanded from one element, so it owns no bytes; its
``.grad`` is where autograd adds up the projected gradient over uses and micro-batches.
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
    """What the next backward of a weight delivers."""

    PROJECTED = "projected"
    """R as ``leaf.grad``: the steady state."""
    REFRESHING = "refreshing"
    """R, and as ``source.leaf.grad`` what the source of the next basis makes of the factors: a sketch, a head's G."""
    CONSUMED = "consumed"
    """The weight is updated inside the backward's graph, from dY and X; what leaves it is of no more use."""
    FULL = "full"
    """G as ``weight.grad``: for an exact SVD, and where all of it is wanted and cannot be consumed."""


class TrainedEntries(Protocol):
    """The entries of a weight that are trained besides its projection: ``remainder.sparse.SparseResidual``."""

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
    """One projected weight.

    Attributes:
        name: qualified name in the model.
        weight: the parameter, (m, n).
        dim: the projected dimension.
        rank: columns of R (rows for ROWS), those of the basis times the granularity.
        basis: (m, r) for ROWS, (n, r) for COLS, or that of one part (runtime/subspace/projection.py); the weight's
            dtype; changed in place, and replaced only by ``share_basis``.
        leaf: Z, (r, n) for ROWS, (m, r) for COLS; its ``.grad`` is R.
        source: where the next basis comes from.
        form: what the next forward prepares the backward to deliver.
        shared_roles: roles whose heads share a basis ("query", ...), if the graph shows such heads in this weight.
        shares_basis: whether the weights of these roles that read the same input are to have one basis; not any more
            once an update has used its own.
        basis_owner: whose basis this one is, None for its own.
        residual: the entries that are trained at full rank besides, None for none.
        source_hook: to be called with the source's leaf when its ``.grad`` is complete.
        first_direction: the unit projected gradient that followed the basis, where a refresh hangs on it.
        complement_norm: of the last scaled residual, 0-d float32; None where the residual is not scaled.
        consumes: whether the backward's graph hands A and B of ``G = A^T B`` to the update.
        consume: what does the update, and returns a tensor of R's shape.
        num_uses: how often a graph that does so has run forward in this window.
        delivers_full: whether the full gradient comes in every backward, since it is small: a factor's.
        right_basis: where both sides are projected, that of the columns, (n, r); ``basis`` is then that of the rows,
            and R is (r, r).
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
        """A record with a fresh leaf around an existing basis, whose next one comes from ``source`` or by iteration."""
        shape = (weight.shape[0], weight.shape[1])
        leaf = storage_free_leaf(dim.projected_shape(shape, rank), weight)
        return cls(name, weight, dim, rank, basis, leaf, source or IteratedBasis(weight, basis))

    def graph_key(self, form: GradientForm) -> tuple[object, ...]:
        """What a graph compiled for this form depends on, besides the weight itself."""
        refreshing = (self.source.name, self.source.graph_key()) if form is GradientForm.REFRESHING else None
        num_entries = self.residual.columns.shape[1] if self.residual is not None else 0
        bits = getattr(self.basis, "bits", None)
        return (self.dim, self.basis.shape, form, self.basis.dtype, bits, num_entries, refreshing)

    def graph_inputs(self, form: GradientForm) -> dict[str, Tensor]:
        """The tensors that a graph of this form takes for this weight, in the order of its extra placeholders."""
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
        """The leaves whose gradients an update needs."""
        return [self.leaf] if self.residual is None else [self.leaf, self.residual.leaf]

    def kept_tensors(self) -> list[Tensor]:
        """What this record holds through the step, besides the weight."""
        right = [self.right_basis] if self.right_basis is not None else []
        return [self.basis, *self.source.kept_tensors(), *self.gradient_leaves(), *right]

    def take_source(self, source: BasisSource) -> None:
        """From the window on that is open now, the next basis comes from another source."""
        is_due = self.form is self.form_of(due=True) and not self.wants_full_gradient
        self.source = source
        if self.source_hook is not None:
            source.leaf.register_post_accumulate_grad_hook(self.source_hook)
        if is_due:
            self.form = self.form_of(due=True)

    def share_basis(self, owner: "ProjectedParameter") -> None:
        """From now on the basis is that of another weight, which alone renews it."""
        self.basis_owner, self.basis, self.shared_roles = owner, owner.basis, frozenset()
        self.take_source(SharedBasis(self.weight, (self.basis.shape[0], self.basis.shape[1])))
        if not self.wants_full_gradient:
            self.form = GradientForm.PROJECTED

    def draw(self, key: int) -> None:
        """Draws for the next window what a refresh takes that is drawn; heads that are found later are drawn then."""
        if self.shared_roles or self.source.draws:
            self.source.draw(key)

    @property
    def residual_is_scaled(self) -> bool:
        """Whether its entries are trained without states."""
        return self.residual is not None and self.residual.variant == "scaled"

    @property
    def is_underway(self) -> bool:
        """Whether a gradient has been projected in this window: basis and form stay as they are until its end."""
        return self.leaf.grad is not None

    @property
    def is_hooked(self) -> bool:
        """Whether someone has hooks on the weight's gradient, which then has to be formed."""
        return has_gradient_hooks(self.weight)

    @property
    def wants_full_gradient(self) -> bool:
        """Whether every backward is to make something of all of G."""
        return self.complement_norm is not None or self.delivers_full

    def stop_consuming(self) -> None:
        """Its backward delivers G from now on."""
        self.consumes, self.form = False, GradientForm.FULL

    def form_of(self, *, due: bool) -> GradientForm:
        """What the next backward is to deliver, where the basis is due and where it is not."""
        if self.wants_full_gradient:
            return GradientForm.CONSUMED if self.consumes else GradientForm.FULL
        if not due or not self.source.looks_at_gradient:
            return GradientForm.PROJECTED
        return GradientForm.FULL if self.source.needs_full else GradientForm.REFRESHING

    def project(self, value: Tensor) -> Tensor:
        """Coordinates of what has the weight's shape: R of a gradient."""
        projected = project(value, self.basis, self.dim)
        return projected if self.right_basis is None else projected @ self.right_basis

    def project_both_sides(self, right_basis: Tensor) -> None:
        """Projects the columns too, with this basis (n, r); before anything else is made of the record."""
        self.right_basis = right_basis
        self.leaf = storage_free_leaf((self.rank, self.rank), self.weight)

    def clear(self) -> None:
        """Forget the gradients in all their forms."""
        for holder in (*self.gradient_leaves(), self.source.leaf, self.weight):
            holder.grad = None


class ParameterRegistry:
    """Projected parameters by the identity of their weight.

    Outside the Parameter, since an attribute on a Parameter is lost by ``.to()`` and copied by deepcopy. Holds its
    records weakly: they live as long as the compiled model that made them, and each keeps its weight, and so the
    weight's identity, alive.
    """

    def __init__(self) -> None:
        self._records: weakref.WeakValueDictionary[int, ProjectedParameter] = weakref.WeakValueDictionary()

    def add(self, record: ProjectedParameter) -> None:
        """Make ``record`` the one for its weight."""
        self._records[id(record.weight)] = record

    def get(self, weight: object) -> ProjectedParameter | None:
        """The record of a weight, None if it is not projected."""
        return self._records.get(id(weight))


# One for the process: a compiled region finds the records of whichever weights it is called with.
REGISTRY = ParameterRegistry()
