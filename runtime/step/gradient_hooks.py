"""Gradient hooks that hold no references, and detection of gradients and weights changed by other code."""

import warnings
import weakref
from collections.abc import Callable, Container, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from galore_fx.runtime.formats.quantized_tensor import stored_tensors


def weak_hook(owner: object, method: str, parameter: nn.Parameter) -> Callable[..., Any]:
    """Returns a hook that calls ``owner.method(parameter, ...)`` with its arguments, while both objects are alive.

    The hook holds neither of them: a cycle through autograd's hooks is never collected.
    """
    weak_owner, weak_parameter = weakref.ref(owner), weakref.ref(parameter)

    def call(*given: Tensor) -> Any:
        alive, known = weak_owner(), weak_parameter()
        if alive is None or known is None:
            return None
        return getattr(alive, method)(known, *given)

    return call


def weak_method(owner: object, method: str) -> Callable[..., Any]:
    """Returns a function that calls ``owner.method`` without holding the owner, which must be alive at the call."""
    weak_owner = weakref.ref(owner)
    return lambda *given: getattr(weak_owner(), method)(*given)


class WriteWatch:
    """Detects changes of parameters between updates by code that cannot see the projected gradients.

    SAM and similar methods move weights along their ``.grad`` before a second backward; projected weights have none and
    would not move. The tensors' versions reveal this: all full-rank parameters were written and no projected weight.
    """

    def __init__(self) -> None:
        self._versions: dict[int, int] = {}
        self._has_warned = False

    def note(self, parameters: Iterable[nn.Parameter]) -> None:
        """Records the versions of the parameters; all changes so far are our own."""
        self._versions = {id(parameter): _version(parameter) for parameter in parameters}

    def warn_of_others(self, parameters: Iterable[nn.Parameter], projected: Container[int]) -> None:
        """Warns once of such a change.

        Args:
            parameters: the trained parameters.
            projected: ``id`` of each projected weight.
        """
        known = [p for p in parameters if id(p) in self._versions]
        written = {id(p) for p in known if _version(p) != self._versions[id(p)]}
        others = {id(p) for p in known if id(p) not in projected}
        if self._has_warned or len(others) < 2 or written != others or len(others) == len(known):
            return
        self._has_warned = True
        warnings.warn(
            f"all {len(others)} parameters at full rank were changed since the last update and none of the "
            f"{len(known) - len(others)} projected weights was: what moves weights along their .grad, as SAM does, "
            "does not see projected gradients. Train such a method with recipe='full'",
            stacklevel=4,
        )


def _version(parameter: nn.Parameter) -> int:
    return sum(part._version for part in stored_tensors(parameter))


class GradientWatch:
    """Detects clipping or scaling that can only have seen the full-rank gradients.

    The version of a gradient shows that it was written, and its first element that its values changed: transformers'
    Trainer multiplies by one if it only needs the norm.
    """

    def __init__(self) -> None:
        self._noted: dict[int, tuple[int, Tensor]] = {}
        self._has_warned = False

    def note(self, parameter: nn.Parameter, _holder: Tensor) -> None:
        """Records version and first element of a full gradient when autograd has accumulated it."""
        if parameter.grad is not None and parameter.grad.numel() > 0:
            self._noted[id(parameter)] = parameter.grad._version, _first_element(parameter.grad).clone()

    def forget(self) -> None:
        """Forgets the recorded gradients; all changes so far are our own."""
        self._noted.clear()

    def warn_of_missing(self, trained: Iterable[nn.Parameter], found: Iterable[nn.Parameter]) -> None:
        """Warns once if no projected weight got a gradient although other parameters did.

        Args:
            trained: the projected weights.
            found: all parameters with a gradient.
        """
        keys = {id(parameter) for parameter in trained if parameter.requires_grad}
        if keys and not self._has_warned and keys.isdisjoint(map(id, found)):
            self._has_warned = True
            warnings.warn(
                "no projected weight got a gradient, though other parameters did, so only those are trained. "
                "backward(inputs=...) does not reach what projected gradients arrive in: leave inputs out",
                stacklevel=5,
            )

    def warn_of_changes(self, parameters: Iterable[nn.Parameter]) -> None:
        """Warns if full gradients were changed by code that cannot have changed the projected ones."""
        for parameter in parameters:
            noted = self._noted.get(id(parameter))
            if noted is None or parameter.grad is None or parameter.grad._version == noted[0]:
                continue
            if not torch.equal(_first_element(parameter.grad), noted[1]):
                warnings.warn(
                    "gradients of full-rank parameters were changed between backward() and step(); projected gradients "
                    "are no parameter's .grad and were not. To clip all of them together, call "
                    "model.galore_fx.optimizer.clip_grad_norm_(max_norm) or compile with max_grad_norm=",
                    stacklevel=5,
                )
                return


def _first_element(grad: Tensor) -> Tensor:
    return grad.detach()[(0,) * grad.dim()]
