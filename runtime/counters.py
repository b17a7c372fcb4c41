"""Counters of a training run."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass
class Counters:
    """Counts the events of a run; saved with the optimizer state.

    Attributes:
        num_updates: finished optimizer steps.
        num_skipped: steps (deferred) or single-parameter updates (in-backward) skipped because of NaN or Inf.
        num_refreshes: bases renewed.
        num_failed_refreshes: refreshes that kept the old basis because the gradient was zero or not finite, or the
            SVD failed.
    """

    num_updates: int = 0
    num_skipped: int = 0
    num_refreshes: int = 0
    num_failed_refreshes: int = 0

    def load(self, saved: Mapping[str, Any]) -> None:
        """Restores the counters from a saved mapping.

        Raises:
            KeyError: a counter is missing.
        """
        for field in dataclasses.fields(self):
            setattr(self, field.name, saved[field.name])
