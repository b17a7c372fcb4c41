"""Share of the optimizer's intended movement that the stored weights make, on a sample of their elements.

    intended  d = W' - W       float32, before the new weight is rounded
    realised  e                movement of the stored weight, after rounding
    share     sum e d / sum d d

A weight in 16 or 8 bits that is rounded to nearest loses every movement below half a step of its grid. Under stochastic
rounding it makes the whole movement on average; the sampled share then varies around 1, less so in a longer run. The
first updates and every 32nd one are sampled, since a sample takes a few small operations.
"""

import dataclasses
import warnings

import torch
from torch import Tensor

from galore_fx.runtime.formats.counter_rng import key_of

# Elements of a sample, a randomly drawn part of the parameter.
SAMPLE_ELEMENTS = 2**14
NUM_FIRST_UPDATES = 4
_INTERVAL = 32
# A share below this makes rounding to nearest warn.
_NOTICED = 0.9
_KINDS = {"projected": "projected weights'", "full_rank": "other parameters'"}


@dataclasses.dataclass
class RealisedMovement:
    """Realised movement of one model's parameters in 16 or 8 bits, separately for projected and full-rank ones.

    Attributes:
        sums: by kind, (2,) float32 on the device of the parameters: sum of e d, sum of d d.
    """

    sums: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def probe(self, kind: str, num_updates: int, number: int) -> "MovementProbe | None":
        """Returns the probe for one update of one parameter; None if this update is not sampled.

        Args:
            kind: "projected" or "full_rank".
            num_updates: number of finished updates.
            number: index of the parameter.
        """
        if num_updates >= NUM_FIRST_UPDATES and num_updates % _INTERVAL:
            return None
        return MovementProbe(self, kind, key_of(num_updates, number) & 0x7FFFFFFF)

    def share(self, kind: str) -> float | None:
        """Returns the realised share of the intended movement; None without samples or without intended movement."""
        found = self.sums.get(kind)
        if found is None or float(found[1]) == 0.0:
            return None
        return float(found[0] / found[1])

    def warn_of_loss(self) -> None:
        """Warns if rounding has removed much of the sampled movement."""
        shares = {words: self.share(kind) for kind, words in _KINDS.items()}
        lost = [f"{share:.0%} of {words}" for words, share in shares.items() if share is not None and share < _NOTICED]
        if lost:
            warnings.warn(
                "rounding='nearest' loses most small updates at this learning rate: of the movement that the optimizer "
                f"intended, {' and '.join(lost)} was made in the first {NUM_FIRST_UPDATES} updates "
                "(stats()['realised_movement']). Compile with rounding='stochastic', or train in float32",
                stacklevel=6,
            )


@dataclasses.dataclass(frozen=True)
class MovementProbe:
    """Samples one update of one parameter.

    Attributes:
        owner: accumulates the samples.
        kind: "projected" or "full_rank".
        turn: index of the sampled part of the parameter, modulo the number of parts.
    """

    owner: RealisedMovement
    kind: str
    turn: int

    def note(self, intended: Tensor, realised: Tensor) -> None:
        """Adds a sample of both movements, float32 tensors of equal shape."""
        of_both = torch.stack([(realised * intended).sum(), intended.square().sum()])
        sums = self.owner.sums.get(self.kind)
        self.owner.sums[self.kind] = of_both if sums is None else sums.add_(of_both)
