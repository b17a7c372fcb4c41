"""``model.galore_fx``: optimizer, plan and statistics of a compiled model."""

import functools
import inspect
import warnings
from collections.abc import Sequence
from typing import Any

from galore_fx.assembly.assemble import Assembled
from galore_fx.assembly.user_optimizer import OptimizerChoice
from galore_fx.errors import UsageError
from galore_fx.recipes.recipe import Recipe
from galore_fx.runtime.step.subspace_optimizer import SubspaceOptimizer
from galore_fx.runtime.step.weight_rounding import is_narrow
from galore_fx.runtime.subspace.basis_heads import HeadBasis
from galore_fx.runtime.subspace.basis_source import SharedBasis

COPY_MESSAGE = (
    "this is a copy of a model compiled by galore_fx; the copy is a plain model that no galore_fx optimizer trains. "
    "Call galore_fx.compile on it to compile it"
)


class Compiled:
    """Gives access to the optimizer, plan and statistics of one compiled model.

    Attributes:
        optimizer: the ``torch.optim.Optimizer`` to step.
        plan: the plan in force, with the decision for each parameter.
        trains_its_model: True; a copy of a compiled model has a ``PlainCopy`` instead, which lacks it.
    """

    trains_its_model = True

    def __init__(self, assembled: Assembled) -> None:
        self.optimizer = assembled.optimizer
        self.plan = assembled.decisions.plan
        self._regions = assembled.compiler
        self._updates = assembled.decisions.updates
        self._blocks = assembled.blocks

    @property
    def optimizer_choice(self) -> OptimizerChoice:
        """The user's optimizer class with its defaults, as a ``functools.partial``."""
        settings = inspect.signature(self._updates.optimizer_class).parameters
        defaults = {key: value for key, value in self.optimizer.defaults.items() if key in settings}
        return functools.partial(self._updates.optimizer_class, **defaults)

    def stats(self) -> dict[str, Any]:
        """Returns counts and measurements of the run so far.

        Returns:
            ``projected``: names of the projected parameters. ``rank``: their ranks in force.
            ``num_updates``, ``num_skipped``, ``num_refreshes``, ``num_failed_refreshes``: see ``Counters``.
            ``refresh_time_s``: seconds spent on refreshes.
            ``refresh_queue``: blocks that wait for a refresh, the next one first, each with the update at which it
            became due and the bytes and seconds that its refresh adds to a step.
            ``refresh_gap``, ``stability`` (lazy refresh only): gap in force and last measurement, by parameter name.
            ``cross_head`` (cross-head projection only): names of the weights whose heads share a basis.
            ``realised_movement`` (weights in 16 or 8 bits only): fraction of the movement intended by the optimizer
            that the stored weights made, for ``projected`` and ``full_rank`` weights, on a sample of elements and
            updates; None before the first sample, around 1 with stochastic rounding.
            ``residual_is_learning``, ``num_residual_entries`` (sparse residuals only): whether any still selects its
            entries, and the number of all entries.
            ``late_parameters``: names of the parameters unfrozen, exchanged or added since compile, which train at full
            rank. ``without_gradient``: names of the trainable parameters without a gradient in the first update.
            ``grad_norm``: 2-norm of all gradients of the last deferred step before clipping; None before that step.
            ``uncompiled``: names of the blocks that could not be captured, each with the reason.
            ``num_region_graphs``, ``num_region_variants``, ``num_update_graphs``: numbers of compiled graphs.
        """
        optimizer = self.optimizer
        return {
            "projected": [record.name for record in optimizer.records],
            "rank": {record.name: record.rank for record in optimizer.records},
            **vars(optimizer.counters),
            "refresh_time_s": optimizer.refreshes.time_s,
            "refresh_queue": _waiting(optimizer, self.plan.regions),
            **optimizer.refreshes.queue.criterion.stats({id(r.weight): r.name for r in optimizer.records}),
            **_recipe_stats(optimizer, self.plan.recipe),
            **_movement(optimizer),
            "late_parameters": list(optimizer.late.names),
            "without_gradient": list(optimizer.late.without_gradient),
            "grad_norm": optimizer.grad_norm,
            "uncompiled": self._blocks.failures if self._blocks else {},
            "num_region_graphs": self._regions.num_graphs,
            "num_region_variants": self._regions.num_variants,
            "num_update_graphs": self._updates.num_graphs,
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> "PlainCopy":
        warnings.warn(COPY_MESSAGE, stacklevel=2)
        return PlainCopy()

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, ()


def _movement(optimizer: SubspaceOptimizer) -> dict[str, Any]:
    if not any(is_narrow(parameter) for group in optimizer.param_groups for parameter in group["params"]):
        return {}
    return {"realised_movement": {kind: optimizer.rounding.movement.share(kind) for kind in ("projected", "full_rank")}}


def _waiting(optimizer: SubspaceOptimizer, blocks: Sequence[str]) -> list[dict[str, Any]]:
    queue = optimizer.refreshes.queue
    return [
        {"block": blocks[layer], "due_since": since, **vars(queue.cost_of(layer))}
        for layer, since in queue.waiting().items()
    ]


def _recipe_stats(optimizer: SubspaceOptimizer, recipe: Recipe) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if recipe.cross_head is not None:
        found["cross_head"] = [
            record.name for record in optimizer.records if isinstance(record.source, HeadBasis | SharedBasis)
        ]
    residuals = [record.residual for record in optimizer.records if record.residual is not None]
    if residuals:
        found["residual_is_learning"] = any(residual.is_learning for residual in residuals)
        found["num_residual_entries"] = sum(residual.leaf.numel() for residual in residuals)
    return found


class PlainCopy:
    """Stands in for ``Compiled`` on a copied model; any access raises UsageError."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UsageError(COPY_MESSAGE)


def _unpickled() -> PlainCopy:
    warnings.warn(COPY_MESSAGE, stacklevel=2)
    return PlainCopy()
