"""States of each parameter: optimizer states, basis, and residual states."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from galore_fx.runtime.formats.state_format import RESIDUAL, SCALES
from galore_fx.runtime.remainder.warm_up import new_residual_state
from galore_fx.runtime.step.update_protocol import Updates
from galore_fx.runtime.subspace.basis_heads import HeadBasis
from galore_fx.runtime.subspace.projected_parameter import ProjectedParameter


class ParameterStates:
    """Creates states, and reads the param groups that they depend on.

    Args:
        updates: the lowered optimizer step.
        states: optimizer states, by parameter; states that become necessary later are added there.
        groups: param group of each parameter, by the parameter's ``id``.
        records: the projected parameters, by ``id`` of the weight.
    """

    def __init__(
        self,
        updates: Updates,
        states: Mapping[Tensor, dict[str, Any]],
        groups: Mapping[int, dict[str, Any]],
        records: Mapping[int, ProjectedParameter],
    ) -> None:
        self._updates, self._states, self._groups, self._records = updates, states, groups, records
        self._settings: dict[int, Any] = {}

    def close_window(self) -> None:
        """Forgets the settings, so the next update reads them anew, and updates states whose basis is now shared."""
        self._settings.clear()
        for record in self._records.values():
            if record.basis_owner is not None:
                self._states[record.weight]["basis"] = record.basis
            elif not isinstance(record.source, HeadBasis):
                record.shares_basis = False

    def settings(self, group: dict[str, Any]) -> Any:
        """Returns the settings of a group, read once per window: at its first update, after any scheduler's change."""
        if id(group) not in self._settings:
            settings = self._settings[id(group)] = self._updates.read(group)
            wanted = self._updates.layout(settings, group).initial.keys()
            for parameter in filter(self._states.__contains__, group["params"]):  # a frozen one has none
                missing = wanted - self._states[parameter].keys()
                if missing:  # a setting is no longer zero and needs a state, such as SGD's momentum
                    new = self.new(parameter)
                    added = [*missing, *(name + SCALES for name in missing), "started"]
                    added += [RESIDUAL + name for name in added]
                    self._states[parameter].update({name: new[name] for name in added if name in new})
        return self._settings[id(group)]

    def new(self, parameter: Tensor) -> dict[str, Tensor]:
        """Returns all states of a parameter, as before its first update."""
        record = self._records.get(id(parameter))
        state = self.like(parameter, record.leaf if record is not None else parameter)
        if record is not None:
            state |= {"basis": record.basis} | new_residual_state(record, self.like)
            if record.right_basis is not None:
                state["right_basis"] = record.right_basis
            if record.first_direction is not None:
                state["first_direction"] = record.first_direction
        return state

    def like(self, parameter: Tensor, like: Tensor) -> dict[str, Tensor]:
        """Returns new states of the optimizer class for a parameter and a gradient of the shape of ``like``."""
        group = self._groups[id(parameter)]
        layout = self._updates.layout(self._updates.read(group), group)
        state = layout.format.make(layout.initial, like, parameter.dtype)
        state |= {name: torch.tensor(value, dtype=torch.float32) for name, value in layout.scalars.items()}
        if None in layout.initial.values():
            # The first step creates some states (SGD's momentum) and has a graph of its own.
            state["started"] = torch.tensor(0.0)
        return state
