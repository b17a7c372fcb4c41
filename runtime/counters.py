"""What has happened in a run so far."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass
class Counters:
    """What has happened so far; saved with the state.

    Attributes:
        num_updates: finished optimizer steps.
        num_skipped: steps (deferred) or single parameters' updates (in-backward) left out for NaN or Inf.
        num_refreshes: bases renewed.
        num_failed_refreshes: refreshes that kept the old basis: the gradient was not finite, zero, or the SVD failed.
    """

    num_updates: int = 0
    num_skipped: int = 0
    num_refreshes: int = 0
    num_failed_refreshes: int = 0

    def load(self, saved: Mapping[str, Any]) -> None:
        """Takes over the counters among what was saved."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, saved[field.name])
