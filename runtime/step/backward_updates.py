"""Updates inside the backward: each parameter when its gradient is complete, in whichever form it comes.

    full gradient, R, entries     a hook on what autograd adds it up in
    A and B of G = A^T B          a call out of the backward's graph (gradient_consumer.py)

One window has one update of each parameter; a second gradient could not be added to the first. Where a weight whose
gradient is consumed has been used more than once, which one backward may go through, G is formed and added up until
autograd has no more for it.
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

# Parameter, gradient (R if it is projected), what the projection leaves of it and is to be applied.
Update = Callable[[nn.Parameter, Tensor, Complement | None], None]


class BackwardUpdates:
    """Those of one model.

    Attributes:
        updated: identities of the parameters that have been updated in this window.

    Args:
        records: the projected parameters, by the identity of the weight.
        refreshes, counters: of the optimizer.
        groups: the param group of each parameter, by its identity.
        scale: factor of back-projected updates.
        update: does it.
        observe: is told of each, with the gradient it consumes.
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
        """Hooks on all that gradients arrive in; they hold neither this object nor the parameters."""
        for parameter in parameters:
            record = self._records.get(id(parameter))
            holders = [parameter, *(record.gradient_leaves() if record is not None else ())]
            for holder in holders:
                holder.register_post_accumulate_grad_hook(weak_hook(self, "take", parameter))
            if record is not None and record.consumes:
                record.consume = weak_hook(self, "consume", parameter)

    def finish(self) -> None:
        """Updates what has waited for more of its gradient and heard of none."""
        for key, record in self._records.items():
            if record.complement_norm is not None and record.weight.grad is not None and key not in self.updated:
                self._take(record.weight, record.weight)

    def close_window(self) -> None:
        """From now on each parameter may be updated again."""
        self.updated.clear()
        self._consumed.clear()
        for record in self._records.values():
            record.num_uses = 0

    def take(self, parameter: nn.Parameter, holder: Tensor) -> None:
        """Updates a parameter from what a leaf or the parameter itself has got.

        Raises:
            UsageError: it has been updated in this window.
        """
        if holder.grad is None or not parameter.requires_grad:
            return  # the other form was delivered; autograd calls the hook all the same
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
                return  # R has come and the entries of its residual have not, or the other way round
            holder = record.leaf
        with torch.no_grad():
            whole = parameter.grad if record is not None and record.complement_norm is not None else None
            if record is not None and parameter.grad is not None:
                self._refreshes.project_full(record, parameter.grad)
                holder = record.leaf
            grad, holder.grad = holder.grad, None
            assert grad is not None
            # By the norm: torch.isfinite on the gradient itself would make temporaries of its size.
            norm = torch.linalg.vector_norm(grad if whole is None else whole)
            self._finish(parameter, grad, whole, norm)

    def consume(self, parameter: nn.Parameter, rows: Tensor, cols: Tensor) -> Tensor:
        """Updates a parameter from the factors of its gradient, without forming more of it than an SVD wants.

        Args:
            parameter: W, (m, n).
            rows, cols: A (t, m) and B (t, n) of ``G = A^T B``.

        Returns:
            A tensor of R's shape and dtype, of no more use.

        Raises:
            UsageError: the parameter has been updated in this window.
        """
        record, product = self._records[id(parameter)], GradientProduct(rows, cols)
        projected = product.projected(record.basis, record.dim).to(record.leaf.dtype)
        if not (accumulates(record.leaf) or accumulates(parameter)):
            return projected
        is_due = self._refreshes.is_due(record) and record.basis_owner is None
        is_sketched = is_due and record.source.looks_at_gradient and not record.source.needs_full
        if not parameter.requires_grad:
            if is_sketched:  # for those that share its basis
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
        """The update, unless the gradient is not finite, and the refresh that waits for it."""
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
