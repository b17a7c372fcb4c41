"""Hooks on gradients: what they may hold, and how it is noticed that someone else has changed a gradient."""

import warnings
import weakref
from collections.abc import Callable, Container, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from galore_fx.runtime.formats.quantized_tensor import stored_tensors


def weak_hook(owner: object, method: str, parameter: nn.Parameter) -> Callable[..., Any]:
    """A hook that calls ``owner.method(parameter, ...)`` with what it is given, as long as both are alive.

    It holds neither: a cycle through autograd's hooks is never collected.
    """
    weak_owner, weak_parameter = weakref.ref(owner), weakref.ref(parameter)

    def call(*given: Tensor) -> Any:
        alive, known = weak_owner(), weak_parameter()
        if alive is None or known is None:
            return None
        return getattr(alive, method)(known, *given)

    return call


def weak_method(owner: object, method: str) -> Callable[..., Any]:
    """``owner.method``, without holding the owner, which has to live when it is called."""
    weak_owner = weakref.ref(owner)
    return lambda *given: getattr(weak_owner(), method)(*given)


class WriteWatch:
    """Notices that parameters are changed between updates by something that cannot know the projected gradients.

    SAM and its like move weights along their ``.grad`` before a second backward; projected weights have none and would
    stay. Seen by the versions of the tensors: every parameter at full rank was written to and no projected one was.
    """

    def __init__(self) -> None:
        self._versions: dict[int, int] = {}
        self._has_warned = False

    def note(self, parameters: Iterable[nn.Parameter]) -> None:
        """All changes up to now are our own."""
        self._versions = {id(parameter): _version(parameter) for parameter in parameters}

    def warn_of_others(self, parameters: Iterable[nn.Parameter], projected: Container[int]) -> None:
        """Says so once.

        Args:
            parameters: those that are trained.
            projected: identities of projected weights.
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
    """Notices a clipping or scaling that could see the full-rank gradients only.

    A gradient's version tells that it was written to, and its first element that the values are other ones: who only
    wants to know the norm (transformers' Trainer) multiplies by one.
    """

    def __init__(self) -> None:
        self._noted: dict[int, tuple[int, Tensor]] = {}
        self._has_warned = False

    def note(self, parameter: nn.Parameter, _holder: Tensor) -> None:
        """Remembers a full gradient as autograd left it."""
        if parameter.grad is not None and parameter.grad.numel() > 0:
            self._noted[id(parameter)] = parameter.grad._version, _first_element(parameter.grad).clone()

    def forget(self) -> None:
        """All changes up to now are our own."""
        self._noted.clear()

    def warn_of_missing(self, trained: Iterable[nn.Parameter], found: Iterable[nn.Parameter]) -> None:
        """Says once that no projected weight got a gradient, though others did.

        Args:
            trained: the projected weights.
            found: all parameters that got one.
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
        """Says so where someone has changed full gradients and cannot have changed the projected ones."""
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
