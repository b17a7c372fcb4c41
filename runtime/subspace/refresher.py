"""Renews due bases from full gradients (exact SVD), from sketches (e.g. subspace iteration), or by random draws."""

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

# Separates the draws of heads and columns from the draws of the rounding, which use the same numbering.
_DRAW_SEED = 1
# Entered around each update (with the gradient it consumes) and each refresh; a memory counter hooks in here.
Observer = Callable[[str, Tensor | None], AbstractContextManager[None]]


class BasisRefresh:
    """Performs the refreshes of one model.

    Attributes:
        queue: queue of the due bases.
        counters: counters of the optimizer, which include the refreshes.
        time_s: seconds spent on computing new bases.

    Args:
        records: the projected parameters, by the identity of the weight.
        queue, counters: see Attributes.
        by_first_vector: measure stability by the first vectors instead of the overlap.
        observe: context entered around each refresh.
        numbers: index of each weight; with the update count it seeds the draws, so a resumed run draws the same.
        transfer: called with a record and its new basis before the old one is overwritten.
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
        """Sets the gradient form of each weight for the window, so that a recomputed forward equals the first.

        All weights of a layer take the refreshing form if one of them is due. A layer thus has two graphs instead of
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
        """Returns whether the basis refreshes in this window and has not been renewed yet."""
        return id(record.weight) in self._turn and id(record.weight) in self.queue.due_since

    def note_direction(self, record: ProjectedParameter, projected: Tensor) -> None:
        """Passes the projected gradient to the refresh criterion before an update consumes it."""
        self.queue.criterion.saw_gradient(id(record.weight), projected, record.first_direction)

    def forget(self) -> None:
        """Drops the sketches of the window."""
        self._sketches.clear()

    def keep_sketch(self, record: ProjectedParameter) -> None:
        """Keeps the sketch of the first micro-batch for a due basis, and drops all other sketches."""
        sketch, record.source.leaf.grad = record.source.leaf.grad, None
        if sketch is not None and id(record.weight) in self.queue.due_since:
            self._sketches.setdefault(id(record.weight), sketch)

    def project_full(self, record: ProjectedParameter, grad: Tensor, *, renew: bool = True) -> None:
        """Replaces a full gradient by its projection, after renewing the basis from it if an SVD is due.

        For sources that need a sketch, a due basis gets its sketch from the full gradient. Warns once per weight if
        the full gradient was not expected.

        Args:
            record: record of the weight.
            grad: full gradient (m, n); ``weight.grad`` is cleared.
            renew: whether an SVD may renew the basis; False if the update will be skipped.
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
        """Renews the bases with a kept sketch, and the due random ones."""
        drawn = [key for key in self._turn if not self._records[key].source.looks_at_gradient]
        for key in [*self._sketches, *sorted(drawn, key=self._numbers.__getitem__)]:
            self.apply_sketch(self._records[key])

    def apply_after(self, record: ProjectedParameter, updated: set[int]) -> None:
        """Calls ``apply_sketch`` once all weights with this basis are in ``updated`` (identities) or frozen."""
        owner = record.basis_owner or record
        if all(id(each.weight) in updated or not each.weight.requires_grad for each in self._sharing(owner)):
            self.apply_sketch(owner)

    def apply_rest(self) -> None:
        """Renews, at the end of the window, sketched bases that still wait for a sharing weight without a gradient."""
        for key in list(self._sketches):
            self.apply_sketch(self._records[key])

    def pass_on(self) -> None:
        """Re-enqueues, after the update, the weights that had their turn but were not renewed, behind the others."""
        for key in self._turn & self.queue.due_since.keys():
            self.queue.fail(key, self.counters.num_updates)

    def sharers(self) -> set[int]:
        """Returns the identities of the weights that use the basis of another weight."""
        return {key for key, record in self._records.items() if record.basis_owner is not None}

    def _sharing(self, owner: ProjectedParameter) -> list[ProjectedParameter]:
        """Returns the weights that use this basis, the owner first."""
        if not owner.shares_basis:
            return [owner]
        return [owner, *(record for record in self._records.values() if record.basis_owner is owner)]

    def apply_sketch(self, record: ProjectedParameter) -> None:
        """Renews one due basis, from its kept sketch or by a random draw."""
        if not record.source.looks_at_gradient and id(record.weight) in self._turn & self.queue.due_since.keys():
            self._renew(record, None)
        sketch = self._sketches.pop(id(record.weight), None)
        if sketch is not None:
            with torch.no_grad():
                self._renew(record, sketch)

    def _renew(self, record: ProjectedParameter, delivered: Tensor | None) -> None:
        """Replaces a basis by the one that its source computes from ``delivered``; keeps it if that fails."""
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
