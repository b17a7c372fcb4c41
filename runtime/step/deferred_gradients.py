"""Gradients of a window that ends in ``step()``: R for projected weights, full gradients for other parameters."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from galore_fx.runtime.subspace.projected_parameter import ProjectedParameter
from galore_fx.runtime.subspace.refresher import BasisRefresh


class DeferredGradients:
    """Collects the gradients of one model.

    Args:
        parameters: returns the parameters of the optimizer, in order.
        records: the projected parameters, by ``id`` of the weight.
        refreshes: refreshes of the optimizer.
    """

    def __init__(
        self,
        parameters: Callable[[], Iterable[nn.Parameter]],
        records: Mapping[int, ProjectedParameter],
        refreshes: BasisRefresh,
    ) -> None:
        self._parameters, self._records, self._refreshes = parameters, records, refreshes

    def collect(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Returns the trainable parameters with their gradients; projects full gradients of projected weights first."""
        gradients = []
        is_finite = self._full_gradients_are_finite()
        for parameter in self._parameters():
            if not parameter.requires_grad:
                continue  # frozen since compile; torch.optim skips it too, for want of a gradient
            record = self._records.get(id(parameter))
            if record is not None and parameter.grad is not None:
                # A gradient that is itself not finite counts as a failed refresh.
                renew = is_finite or not bool(torch.isfinite(torch.linalg.vector_norm(parameter.grad)))
                self._refreshes.project_full(record, parameter.grad, renew=renew)
            holder = record.leaf if record is not None else parameter
            if holder.grad is not None:
                gradients.append((parameter, holder.grad))
        return gradients

    def holders(self) -> Iterable[Tensor]:
        """Yields the tensors whose ``.grad`` holds the gradients, the leaves of residuals included."""
        for parameter in self._parameters():
            record = self._records.get(id(parameter))
            yield record.leaf if record is not None else parameter
            if record is not None and record.residual is not None:
                yield record.residual.leaf

    def _full_gradients_are_finite(self) -> bool:
        """Returns whether the step will not be skipped; True without a check if no full gradient renews a basis now."""
        records = self._records.values()
        if not any(record.source.needs_full and self._refreshes.is_due(record) for record in records):
            return True
        full = [record.weight.grad for record in records if record.weight.grad is not None]
        others = [holder.grad for holder in self.holders() if holder.grad is not None]
        return bool(torch.isfinite(torch.nn.utils.get_total_norm([*full, *others])))
