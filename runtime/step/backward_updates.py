"""Updates each parameter inside the backward, as soon as its gradient is complete.

    full gradient, R, entries     a hook on the leaf in which autograd accumulates it
    A and B of G = A^T B          a call from the backward's graph (gradient_consumer.py)

Each parameter is updated once per window; a second gradient could not be added to the first. If a weight with consumed
gradients is used several times in a window, G is formed and accumulated until autograd has finished with the weight.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from galore_fx.errors import UsageError
from galore_fx.runtime.counters import Counters
from galore_fx.runtime.remainder.scaled import Complement, complement_of
from galore_fx.runtime.step.gradient_hooks import weak_hook
from galore_fx.runtime.subspace.factored_gradient import GradientProduct
from galore_fx.runtime.subspace.projected_parameter import GradientForm, ProjectedParameter
from galore_fx.runtime.subspace.refresher import BasisRefresh, Observer
from galore_fx.runtime.torch_private import accumulates

# Applies an update from a parameter, its gradient (R if projected), and the remainder to apply, if any.
Update = Callable[[nn.Parameter, Tensor, Complement | None], None]


class BackwardUpdates:
    """Updates the parameters of one model inside the backward.

    Attributes:
        updated: ``id`` of each parameter that has been updated in this window.

    Args:
        records: the projected parameters, by ``id`` of the weight.
        refreshes: refreshes of the optimizer.
        counters: counters of the optimizer.
        groups: param group of each parameter, by the parameter's ``id``.
        scale: factor of back-projected updates.
        update: applies one update.
        observe: returns a context for each update, from its kind and the gradient it consumes.
    """

    def __init__(
        self,
        records: Mapping[int, ProjectedParameter],
        refreshes: BasisRefresh,
        counters: Counters,
        groups: Mapping[int, dict[str, object]],
        scale: float,
        update: Update,
        observe: Observer,
    ) -> None:
        self.updated: set[int] = set()
        self._records, self._refreshes, self._counters = records, refreshes, counters
        self._groups, self._scale = groups, scale
        self._update, self._observe = update, observe
        self._consumed: set[int] = set()

    def install(self, parameters: Iterable[nn.Parameter]) -> None:
        """Installs hooks on the parameters and their leaves; the hooks hold neither this object nor the parameters."""
        for parameter in parameters:
            record = self._records.get(id(parameter))
            holders = [parameter, *(record.gradient_leaves() if record is not None else ())]
            for holder in holders:
                holder.register_post_accumulate_grad_hook(weak_hook(self, "take", parameter))
            if record is not None and record.consumes:
                record.consume = weak_hook(self, "consume", parameter)

    def finish(self) -> None:
        """Updates the weights that still wait for more of an accumulated G; the backward is over."""
        for key, record in self._records.items():
            if record.complement_norm is not None and record.weight.grad is not None and key not in self.updated:
                self._take(record.weight, record.weight)

    def close_window(self) -> None:
        """Starts a new window, in which each parameter may be updated again."""
        self.updated.clear()
        self._consumed.clear()
        for record in self._records.values():
            record.num_uses = 0

    def take(self, parameter: nn.Parameter, holder: Tensor) -> None:
        """Updates a parameter from the gradient in ``holder``, one of its leaves or the parameter itself.

        Raises:
            UsageError: the parameter has already been updated in this window.
        """
        if holder.grad is None or not parameter.requires_grad:
            return  # another form was delivered; autograd calls the hook anyway
        record = self._records.get(id(parameter))
        if record is not None and id(parameter) in self._consumed and holder is not parameter:
            holder.grad = None
            return
        self._take(parameter, holder)

    def _take(self, parameter: nn.Parameter, holder: Tensor) -> None:
        self._refuse_second(parameter)
        record = self._records.get(id(parameter))
        if record is not None and holder is not parameter:
            if any(leaf.grad is None for leaf in record.gradient_leaves()):
                return  # R or the entries of the residual are still missing
            holder = record.leaf
        with torch.no_grad():
            whole = parameter.grad if record is not None and record.complement_norm is not None else None
            if record is not None and parameter.grad is not None:
                self._refreshes.project_full(record, parameter.grad)
                holder = record.leaf
            grad, holder.grad = holder.grad, None
            assert grad is not None
            # torch.isfinite on the gradient itself would create temporaries of its size.
            norm = torch.linalg.vector_norm(grad if whole is None else whole)
            self._finish(parameter, grad, whole, norm)

    def consume(self, parameter: nn.Parameter, rows: Tensor, cols: Tensor) -> Tensor:
        """Updates a parameter from the factors of its gradient; forms G only for an SVD or several uses.

        Args:
            parameter: W, (m, n).
            rows: A, (t, m), of ``G = A^T B``.
            cols: B, (t, n).

        Returns:
            R, in the dtype of its leaf; an update may have overwritten it.

        Raises:
            UsageError: the parameter has already been updated in this window.
        """
        record, product = self._records[id(parameter)], GradientProduct(rows, cols)
        projected = product.projected(record.basis, record.dim).to(record.leaf.dtype)
        if not (accumulates(record.leaf) or accumulates(parameter)):
            return projected
        is_due = self._refreshes.is_due(record) and record.basis_owner is None
        is_sketched = is_due and record.source.looks_at_gradient and not record.source.needs_full
        if not parameter.requires_grad:
            if is_sketched:  # for the weights that share its basis
                self._keep_sketch(record, product, projected)
                self._refreshes.apply_after(record, self.updated)
            return projected
        self._refuse_second(parameter)
        self._consumed.add(id(parameter))
        waits = record.num_uses > 1 or record.form is not GradientForm.CONSUMED
        if waits or (is_due and record.source.needs_full):
            grad = product.formed().to(parameter.dtype)
            parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
            if not waits:
                self._take(parameter, parameter)
        else:
            if is_sketched:
                self._keep_sketch(record, product, projected)
            with self._observe("update", projected):
                energies = product.energies(record.dim)
                self._finish(parameter, projected, product, energies.sum(), energies)
        return projected

    def _keep_sketch(self, record: ProjectedParameter, product: GradientProduct, projected: Tensor) -> None:
        delivered = product.delivered_for(record.source, projected, record.dim)
        record.source.leaf.grad = delivered.to(record.leaf.dtype)
        self._refreshes.keep_sketch(record)

    def _finish(
        self,
        parameter: nn.Parameter,
        grad: Tensor,
        whole: Tensor | GradientProduct | None,
        norm: Tensor,
        energies: Tensor | None = None,
    ) -> None:
        """Applies the update if the gradient is finite, then any refresh that waits for it."""
        record = self._records.get(id(parameter))
        if torch.isfinite(norm):
            with self._observe("update", whole if isinstance(whole, Tensor) else grad):
                complement = None
                if record is not None and whole is not None:
                    group = self._groups[id(parameter)]
                    complement = complement_of(record, whole, energies, grad, group, self._scale)
                self._update(parameter, grad, complement)
        else:
            self._counters.num_skipped += 1
        self.updated.add(id(parameter))
        if record is not None:
            self._refreshes.apply_after(record, self.updated)

    def _refuse_second(self, parameter: nn.Parameter) -> None:
        if id(parameter) in self.updated:
            raise UsageError(
                "a second backward before optimizer.step(), or a weight that is used outside its block too: "
                "update='in-backward' has consumed the parameter's first gradient and cannot add to it. Call "
                "model.galore_fx.optimizer.step() after each backward, or compile with update='deferred' to accumulate "
                "gradients"
            )
