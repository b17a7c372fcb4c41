"""Renews the bases that are due, from full gradients (exact SVD) or from sketches (subspace iteration)."""

import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from galore_fx.runtime.counters import Counters
from galore_fx.runtime.formats.counter_rng import key_of
from galore_fx.runtime.subspace.projected_parameter import GradientForm, ProjectedParameter
from galore_fx.runtime.subspace.refresh_criteria import first_vector_cosine
from galore_fx.runtime.subspace.refresh_queue import RefreshQueue

# Keeps the draws of heads and columns apart from those of the rounding, which are numbered alike.
_DRAW_SEED = 1
# Around each update (with the gradient it consumes) and each refresh: what a memory counter hooks into.
Observer = Callable[[str, Tensor | None], AbstractContextManager[None]]


class BasisRefresh:
    """The refreshes of one model.

    Attributes:
        queue: which bases are due, and whose turn it is.
        counters: of the optimizer; refreshes are counted there.
        time_s: seconds spent on new bases.

    Args:
        records: the projected parameters, by the identity of the weight.
        queue: the same.
        counters: the same.
        by_first_vector: measure stability by the first vectors and not by the overlap.
        observe: is told of each refresh.
        numbers: the position of each weight, which with the number of updates says which heads and columns are drawn.
        transfer: is told of each new basis before it takes the old one's place.
    """

    def __init__(
        self,
        records: Mapping[int, ProjectedParameter],
        queue: RefreshQueue,
        counters: Counters,
        *,
        by_first_vector: bool,
        observe: Observer,
        numbers: Mapping[int, int],
        transfer: Callable[[ProjectedParameter, Tensor], None],
    ) -> None:
        self.queue = queue
        self.counters = counters
        self.time_s = 0.0
        self._records = records
        self._by_first_vector = by_first_vector
        self._observe = observe
        self._numbers = numbers
        self._transfer = transfer
        self._sketches: dict[int, Tensor] = {}
        self._turn: set[int] = set()
        self._named: set[str] = set()

    def set_forms(self) -> None:
        """Fixed for the window, so that a recomputed forward is the same as the first.

        All weights of a layer take the refreshing form where one of them is due: a layer has two graphs then, and not
        one for each combination.
        """
        for key, record in self._records.items():
            is_frozen = not record.weight.requires_grad and not record.shares_basis
            if record.basis_owner is not None or is_frozen:
                self.queue.due_since.pop(key, None)
        self._turn = self.queue.turn()
        layers = {self.queue.layer_of(key) for key in self._turn}
        for key, record in self._records.items():
            record.draw(key_of(_DRAW_SEED, self.counters.num_updates, self._numbers[key]))
            record.form = record.form_of(due=self.queue.layer_of(key) in layers)

    def is_due(self, record: ProjectedParameter) -> bool:
        """Whether its basis is to be renewed in this window and has not been yet."""
        return id(record.weight) in self._turn and id(record.weight) in self.queue.due_since

    def note_direction(self, record: ProjectedParameter, projected: Tensor) -> None:
        """Takes note of a gradient that an update is about to consume, where a refresh hangs on it."""
        self.queue.criterion.saw_gradient(id(record.weight), projected, record.first_direction)

    def forget(self) -> None:
        """Drops the sketches of the window."""
        self._sketches.clear()

    def keep_sketch(self, record: ProjectedParameter) -> None:
        """Keeps the first micro-batch's sketch of a basis that is due, and drops all others."""
        sketch, record.source.leaf.grad = record.source.leaf.grad, None
        if sketch is not None and id(record.weight) in self.queue.due_since:
            self._sketches.setdefault(id(record.weight), sketch)

    def project_full(self, record: ProjectedParameter, grad: Tensor, *, renew: bool = True) -> None:
        """Leaves the projected gradient in place of a full one, after renewing the basis from it if an SVD is due.

        Args:
            record: of the weight.
            grad: its gradient; forgotten.
            renew: whether an SVD may do so; not where the update is going to be skipped.
        """
        source = record.source
        if self.is_due(record) and source.looks_at_gradient:
            if not source.needs_full:
                self._sketches.setdefault(id(record.weight), source.from_full(grad, record.basis, record.dim))
            elif renew:
                self._renew(record, grad)
        expected = record.form in (GradientForm.FULL, GradientForm.CONSUMED) and not record.is_hooked
        if not expected and record.name not in self._named:
            self._named.add(record.name)
            warnings.warn(
                f"the full gradient of {record.name} was formed, and then projected: the weight is read by something "
                "that is no linear layer, or outside its block, or its block did not run through galore_fx, or a hook "
                "wants its gradient. Right, but slow and large",
                stacklevel=2,
            )
        projected = record.project(grad)
        record.leaf.grad = projected if record.leaf.grad is None else record.leaf.grad + projected
        if record.residual is not None:
            record.residual.add_gradient(grad)
        record.weight.grad = None

    def apply_sketches(self) -> None:
        """Renews the bases whose sketches have been kept, and those that are drawn."""
        drawn = [key for key in self._turn if not self._records[key].source.looks_at_gradient]
        for key in [*self._sketches, *sorted(drawn, key=self._numbers.__getitem__)]:
            self.apply_sketch(self._records[key])

    def apply_after(self, record: ProjectedParameter, updated: set[int]) -> None:
        """As ``apply_sketch``, once all weights with this one's basis have been updated, by their identities."""
        owner = record.basis_owner or record
        if all(id(each.weight) in updated or not each.weight.requires_grad for each in self._sharing(owner)):
            self.apply_sketch(owner)

    def apply_rest(self) -> None:
        """Renews what has been sketched and waits for a weight that got no gradient; the window is over."""
        for key in list(self._sketches):
            self.apply_sketch(self._records[key])

    def pass_on(self) -> None:
        """The window's update is done: what had its turn and got no gradient waits again, behind the others."""
        for key in self._turn & self.queue.due_since.keys():
            self.queue.fail(key, self.counters.num_updates)

    def sharers(self) -> set[int]:
        """Identities of the weights whose basis is that of another one."""
        return {key for key, record in self._records.items() if record.basis_owner is not None}

    def _sharing(self, owner: ProjectedParameter) -> list[ProjectedParameter]:
        """The weights whose basis it is, itself first."""
        if not owner.shares_basis:
            return [owner]
        return [owner, *(record for record in self._records.values() if record.basis_owner is owner)]

    def apply_sketch(self, record: ProjectedParameter) -> None:
        """Renews one basis, if it is due: from its sketch, where that has been kept, or as it is drawn."""
        if not record.source.looks_at_gradient and id(record.weight) in self._turn & self.queue.due_since.keys():
            self._renew(record, None)
        sketch = self._sketches.pop(id(record.weight), None)
        if sketch is not None:
            with torch.no_grad():
                self._renew(record, sketch)

    def _renew(self, record: ProjectedParameter, delivered: Tensor | None) -> None:
        """Exchanges a basis for the one that its source finds in what a backward has delivered."""
        start = time.perf_counter()
        key, source = id(record.weight), record.source
        with self._observe("refresh", None):
            basis = source.find(delivered, record.basis, record.dim)
            if basis is None:
                self.counters.num_failed_refreshes += 1
                self.queue.fail(key, self.counters.num_updates)
            else:
                if self.queue.measures(self.counters.num_updates):
                    old = record.basis
                    if self._by_first_vector:
                        stability = first_vector_cosine(old, basis)
                    else:
                        stability = source.overlap(delivered, old, basis, record.dim)
                    self.queue.criterion.saw_refresh(key, stability)
                sharing = self._sharing(record)
                for each in sharing:
                    self._transfer(each, basis)
                record.basis.copy_(basis)
                self.counters.num_refreshes += 1
                for each in sharing:
                    self.queue.finish(id(each.weight))
        self.time_s += time.perf_counter() - start
