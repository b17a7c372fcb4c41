"""The gradients of a window that waits for ``step()``: projected where they are, full elsewhere."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from galore_fx.runtime.subspace.projected_parameter import ProjectedParameter
from galore_fx.runtime.subspace.refresher import BasisRefresh


class DeferredGradients:
    """Those of one model.

    Args:
        parameters: the optimizer's, in order.
        records: the projected ones, by the identity of the weight.
        refreshes: of the optimizer.
    """

    def __init__(
        self,
        parameters: Callable[[], Iterable[nn.Parameter]],
        records: Mapping[int, ProjectedParameter],
        refreshes: BasisRefresh,
    ) -> None:
        self._parameters, self._records, self._refreshes = parameters, records, refreshes

    def collect(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Each parameter with its gradient, projected where it is; full gradients of what is due are consumed."""
        gradients = []
        is_finite = self._full_gradients_are_finite()
        for parameter in self._parameters():
            if not parameter.requires_grad:
                continue  # frozen since compile: as torch.optim, which sees no gradient then
            record = self._records.get(id(parameter))
            if record is not None and parameter.grad is not None:
                # One that is not finite itself is counted as a refresh that failed.
                renew = is_finite or not bool(torch.isfinite(torch.linalg.vector_norm(parameter.grad)))
                self._refreshes.project_full(record, parameter.grad, renew=renew)
            holder = record.leaf if record is not None else parameter
            if holder.grad is not None:
                gradients.append((parameter, holder.grad))
        return gradients

    def holders(self) -> Iterable[Tensor]:
        """What the gradients arrive in, those of residuals too."""
        for parameter in self._parameters():
            record = self._records.get(id(parameter))
            yield record.leaf if record is not None else parameter
            if record is not None and record.residual is not None:
                yield record.residual.leaf

    def _full_gradients_are_finite(self) -> bool:
        """Whether nothing keeps a step from following on the bases that full gradients are about to renew."""
        records = self._records.values()
        if not any(record.source.needs_full and self._refreshes.is_due(record) for record in records):
            return True
        full = [record.weight.grad for record in records if record.weight.grad is not None]
        others = [holder.grad for holder in self.holders() if holder.grad is not None]
        return bool(torch.isfinite(torch.nn.utils.get_total_norm([*full, *others])))
