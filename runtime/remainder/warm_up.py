"""Trains the residuals of a model's projected weights: their gradients and their states.

While its entries are learnt, a weight keeps their scores, one for each slot of a block of rows. Afterwards it keeps
optimizer states of the shape of the entries, or the norm of the last applied residual.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from galore_fx.runtime.counters import Counters
from galore_fx.runtime.formats.state_format import RESIDUAL, is_of_residual
from galore_fx.runtime.remainder.sparse import back_projection_at
from galore_fx.runtime.subspace.projected_parameter import ProjectedParameter

MakeState = Callable[[Tensor, Tensor], dict[str, Tensor]]


def new_residual_state(record: ProjectedParameter, make_state: MakeState) -> dict[str, Tensor]:
    """Returns the current state tensors of a weight's residual, by name; empty without a residual.

    Args:
        record: record of the weight.
        make_state: returns new states of the optimizer class for a weight and a tensor of the gradient's shape.
    """
    residual = record.residual
    if record.complement_norm is not None:
        return {f"{RESIDUAL}norm": record.complement_norm}
    if residual is None:
        return {}
    if residual.scores is not None:
        return {"columns": residual.columns, "scores": residual.scores}
    if residual.norm is not None:
        return {"columns": residual.columns, f"{RESIDUAL}norm": residual.norm}
    own = make_state(record.weight, residual.leaf)
    return {"columns": residual.columns, **{RESIDUAL + name: value for name, value in own.items()}}


class ResidualTraining:
    """Trains the sparse residuals of one model.

    Args:
        records: the projected parameters.
        states: states of the optimizer, by weight.
        counters: counters of the optimizer.
        make_state: as for ``new_residual_state``.
    """

    def __init__(
        self,
        records: Iterable[ProjectedParameter],
        states: Mapping[Tensor, dict[str, Any]],
        counters: Counters,
        make_state: MakeState,
    ) -> None:
        self._records = [record for record in records if record.residual is not None]
        self._states, self._counters = states, counters
        self._make_state = make_state

    def entries(self, record: ProjectedParameter | None, projected: Tensor) -> Tensor | None:
        """Consumes the gradient at the entries of a weight and returns the input of their update.

        While the entries are learnt, this method learns from the gradient instead.

        Args:
            record: record of the weight; None if it is not projected.
            projected: R.

        Returns:
            (m, k): G for rectified, E for the other variants. None if the weight has no residual or no gradient at
            the entries, or while they are learnt.
        """
        residual = record.residual if record is not None else None
        if record is None or residual is None or residual.leaf.grad is None:
            return None
        entries, residual.leaf.grad = residual.leaf.grad, None
        if residual.is_learning or residual.variant != "rectified":
            entries = entries - back_projection_at(projected, record.basis, record.dim, residual.columns)
        if not residual.is_learning:
            return entries
        residual.learn(entries, record.weight.shape[1], self._counters.num_updates)
        return None

    def set_learning(self, num_updates: int) -> Callable[[], None]:
        """Ends the learning of entries after the warm-up, or resumes it for an earlier state.

        Returns:
            A function that undoes the change; valid until entries are learnt again.
        """
        before = []
        for record in self._records:
            residual = record.residual
            assert residual is not None
            kept = residual.scores, residual.norm
            residual.set_learning(num_updates)
            if (residual.scores is None) != (kept[0] is None):
                state = self._states[record.weight]
                taken = {name: state.pop(name) for name in list(state) if is_of_residual(name)}
                state |= new_residual_state(record, self._make_state)
                before.append((residual, state, kept, taken))

        def go_back() -> None:
            for residual, state, kept, taken in before:
                for name in [name for name in state if is_of_residual(name)]:
                    del state[name]
                state |= taken
                residual.scores, residual.norm = kept

        return go_back
