"""Steps a weight's residual: runs the compiled body on some entries of the weight and adds the result there.

    body(R, states)         ->  L       W <- c W + back_project(L)
    body(G, states')        ->  L'      W[entries] <- c W[entries] + L'     rectified
    body(E, states')        ->  L'      W[entries] += L'                    additive

The body is elementwise, so it takes entries as it takes coordinates. ``E = G - back_project(R)`` at the entries is
computed before the step (runtime/remainder/sparse.py).
"""

import dataclasses

from torch import Tensor

from galore_fx.passes.optimizer_graph.compiled_update import CompiledUpdate
from galore_fx.runtime.remainder.sparse import (
    add_at_,
    add_in_rows_,
    back_projection_at,
    entries_of,
    set_at_,
    set_in_rows_,
)
from galore_fx.runtime.subspace.projected_parameter import ProjectedParameter
from galore_fx.runtime.subspace.projection import project


@dataclasses.dataclass
class ResidualStep:
    """One step of one weight's residual.

    Attributes:
        compiled, branch, values, scale: the compiled step, its branch and its numbers.
        tensors: states of the entries, changed in place.
        state: all states of the residual by name, ``tensors`` and scalar states among them.
        record: record of the weight, with the projection and the entries.
        entries: G or E, (m, k); consumed.
    """

    compiled: CompiledUpdate
    branch: int
    values: tuple[float, ...]
    scale: float
    tensors: list[Tensor]
    state: dict[str, Tensor]
    record: ProjectedParameter
    entries: Tensor
    _before: Tensor | None = None
    _read: Tensor | None = None
    _made: tuple[Tensor, float] | None = None

    def read_weight(self, weight: Tensor) -> None:
        """Copies the parts of the weight (m, n) that the step needs, before the update changes them."""
        record, residual = self.record, self.record.residual
        assert residual is not None
        if not (residual.variant == "rectified" or self.compiled.needs_weight):
            return
        self._before = before = entries_of(weight, residual.columns)
        if self.compiled.needs_weight and residual.variant == "rectified":  # an L2 decay
            self._read = before.clone()
        elif self.compiled.needs_weight:  # the part inside the subspace decays in the subspace step
            inside = project(weight, record.basis, record.dim)
            self._read = before - back_projection_at(inside, record.basis, record.dim, residual.columns)

    def add_to_(self, weight: Tensor) -> None:
        """Adds the step to the weight (m, n), after its update in the subspace."""
        residual = self.record.residual
        assert residual is not None
        change, factor = self._step()
        if residual.variant == "rectified":
            assert self._before is not None
            set_at_(weight, residual.columns, self._before.mul_(factor).add_(change))
        else:
            add_at_(weight, residual.columns, change)

    def add_to_rows_(self, change: Tensor, rows: slice) -> None:
        """Adds the step to the change of some rows of the weight, (rows, n), in place.

        The factor of the weight is left to the subspace step, which computes the same one from the same settings.
        """
        residual = self.record.residual
        assert residual is not None
        made, _ = self._step()
        put = set_in_rows_ if residual.variant == "rectified" else add_in_rows_
        put(change, rows, residual.columns, made[rows])

    def _step(self) -> tuple[Tensor, float]:
        """Returns the change of the entries, (m, k), and the factor applied to them before; computed once."""
        if self._made is None:
            values, dtype = (*self.values, self.scale), self.record.weight.dtype
            about = (self.branch, self.entries, self.tensors, self.state, values, dtype, self._read)
            self._made = self.compiled.step_low(*about)
        return self._made
