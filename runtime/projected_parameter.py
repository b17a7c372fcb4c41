"""A weight that is trained in a subspace, and the registry that finds it from the parameter itself.

    forward of a region     weight W (m, n), basis P, leaf Z (no storage)   ->  Y
    backward of a region    dY                                             ->  dX, Z.grad = R

``Z`` is a zero with the projected gradient's shape that is expanded from one element, so it owns no bytes; its
``.grad`` is where autograd adds up the projected gradient over uses and micro-batches.
"""

import dataclasses
import enum
import weakref

import torch
from torch import Tensor, nn

from galore_fx.runtime.subspace import ProjectedDim


class GradientForm(enum.Enum):
    """What the next backward of a weight delivers."""

    PROJECTED = "projected"
    """R as ``leaf.grad``: the steady state."""
    SKETCHED = "sketched"
    """R, and ``G^T G P`` (or ``G G^T P``) as ``sketch_leaf.grad``: one iteration of the subspace method."""
    FULL = "full"
    """G as ``weight.grad``: for an exact SVD."""


def storage_free_leaf(shape: tuple[int, int], like: Tensor) -> Tensor:
    """A zero tensor of this shape that requires grad and owns one element of storage."""
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(shape).requires_grad_()


@dataclasses.dataclass(eq=False)
class ProjectedParameter:
    """One projected weight.

    Attributes:
        name: qualified name in the model.
        weight: the parameter, (m, n).
        dim: the projected dimension.
        rank: columns of the basis.
        basis: (m, r) for ROWS, (n, r) for COLS, the weight's dtype; changed in place, never replaced.
        leaf: Z, (r, n) for ROWS, (m, r) for COLS; its ``.grad`` is R.
        sketch_leaf: shape of the basis; its ``.grad`` is the sketch of the next basis.
        form: what the next forward prepares the backward to deliver.
        refresh_form: what it is when the basis is due.
    """

    name: str
    weight: nn.Parameter
    dim: ProjectedDim
    rank: int
    basis: Tensor
    leaf: Tensor
    sketch_leaf: Tensor
    form: GradientForm = GradientForm.PROJECTED
    refresh_form: GradientForm = GradientForm.SKETCHED

    @classmethod
    def create(
        cls, name: str, weight: nn.Parameter, dim: ProjectedDim, rank: int, basis: Tensor
    ) -> "ProjectedParameter":
        """A record with fresh leaves around an existing basis."""
        shape = (weight.shape[0], weight.shape[1])
        leaf = storage_free_leaf(dim.projected_shape(shape, rank), weight)
        return cls(name, weight, dim, rank, basis, leaf, storage_free_leaf(dim.basis_shape(shape, rank), weight))

    def graph_key(self, form: GradientForm) -> tuple[object, ...]:
        """What a graph compiled for this form depends on, besides the weight itself."""
        return (self.dim, self.rank, form, self.basis.dtype, getattr(self.basis, "bits", None))

    def graph_inputs(self, form: GradientForm) -> tuple[Tensor, ...]:
        """The tensors that a graph of this form takes for this weight, in the order of its extra placeholders."""
        if form is GradientForm.FULL:
            return ()
        if form is GradientForm.SKETCHED:
            return (self.basis, self.leaf, self.sketch_leaf)
        return (self.basis, self.leaf)

    def clear(self) -> None:
        """Forget the gradients in all their forms."""
        self.leaf.grad = self.sketch_leaf.grad = self.weight.grad = None


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
