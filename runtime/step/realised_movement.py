"""How much of the movement that the optimizer intends the stored weights make, on a sample of their elements.

    intended  d = W' - W       in float32, before the new weight is rounded
    realised  e                what the weight has moved by after it
    share     sum e d / sum d d

A weight in 16 or 8 bits that is rounded to the nearest loses all that is less than half a step of its grid. Rounded
stochastically it makes the whole movement on average; what the sample shows then varies around 1, the less the longer
the run. Looked at in the first updates and then from time to time, since it takes a few small operations.
"""

import dataclasses
import warnings

import torch
from torch import Tensor

from galore_fx.runtime.formats.counter_rng import key_of

# Of a parameter; of a part of it that is drawn each time.
SAMPLE_ELEMENTS = 2**14
NUM_FIRST_UPDATES = 4
_INTERVAL = 32
# Below it users of rounding to the nearest are warned.
_NOTICED = 0.9
_KINDS = {"projected": "projected weights'", "full_rank": "other parameters'"}


@dataclasses.dataclass
class RealisedMovement:
    """Of one model's parameters in 16 or 8 bits, those projected and those at full rank apart.

    Attributes:
        sums: by kind, (2,) float32 on the parameters' device: sum of e d, sum of d d.
    """

    sums: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def probe(self, kind: str, num_updates: int, number: int) -> "MovementProbe | None":
        """What looks at one update of one parameter; None in updates that are not looked at.

        Args:
            kind: "projected" or "full_rank".
            num_updates: updates that are done.
            number: of the parameter.
        """
        if num_updates >= NUM_FIRST_UPDATES and num_updates % _INTERVAL:
            return None
        return MovementProbe(self, kind, key_of(num_updates, number) & 0x7FFFFFFF)

    def share(self, kind: str) -> float | None:
        """Realised share of the intended movement; None where none has been looked at, or none was intended."""
        found = self.sums.get(kind)
        if found is None or float(found[1]) == 0.0:
            return None
        return float(found[0] / found[1])

    def warn_of_loss(self) -> None:
        """Says so where much of the movement that was looked at has been rounded away."""
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
    """Looks at one update of one parameter.

    Attributes:
        turn: which part of the parameter is looked at, modulo their number.
    """

    owner: RealisedMovement
    kind: str
    turn: int

    def note(self, intended: Tensor, realised: Tensor) -> None:
        """Adds a sample: both of one shape, float32."""
        of_both = torch.stack([(realised * intended).sum(), intended.square().sum()])
        sums = self.owner.sums.get(self.kind)
        self.owner.sums[self.kind] = of_both if sums is None else sums.add_(of_both)
