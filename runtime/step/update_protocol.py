"""Interface of the lowered optimizer step. The runtime imports no pass; it receives an implementation."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from galore_fx.runtime.formats.state_format import Layout
from galore_fx.runtime.remainder.scaled import Complement
from galore_fx.runtime.step.realised_movement import MovementProbe
from galore_fx.runtime.subspace.projected_parameter import ProjectedParameter


class Updates(Protocol):
    """One optimizer step of one parameter, which the passes build from the user's class."""

    def read(self, group: Mapping[str, Any]) -> Any: ...

    def layout(self, settings: Any, group: Mapping[str, Any]) -> Layout: ...

    def update(
        self,
        weight: Tensor,
        grad: Tensor,
        state: dict[str, Tensor],
        group: Mapping[str, Any],
        settings: Any,
        record: ProjectedParameter | None,
        scale: float,
        *,
        first: bool,
        rounding_key: Tensor | None,
        entries: Tensor | None,
        complement: Complement | None,
        probe: MovementProbe | None,
    ) -> None: ...
