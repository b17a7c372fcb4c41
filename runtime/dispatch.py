"""Who runs when a region of the model is called: its compiled form, or the forward it came with.

    training, grad enabled, compiled model live   ->  compiled region (one per forward function, shared by its layers)
    eval, no_grad, inference_mode, generate()     ->  the original forward

Each model has its own code objects, since Dynamo keeps its variants per code object and would otherwise run out of
them when several models share the class of a layer.
"""

import inspect
import itertools
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from galore_fx.errors import CaptureError
from galore_fx.runtime.compatibility import DynamoError

_NUMBERS = itertools.count()


def own_code_object(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls ``function``, with a code object and a name that no other function has.

    The name matters too: Dynamo remembers under file, line and name which sizes have changed between calls, and would
    make a second model's sizes symbols because they are not those of the first.
    """

    def region(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    code = region.__code__.replace(co_name=f"region_{next(_NUMBERS)}")
    return types.FunctionType(code, region.__globals__, code.co_name, None, region.__closure__)


class _StandIn:
    """Stands in for a method of one module; a copied or pickled module gets its class's own method back."""

    method = "forward"

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        # generate() and Trainer look up which arguments a model takes.
        self.__signature__ = inspect.signature(getattr(module, self.method))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return plain_method(memo[id(self.module)], self.method)

    def __reduce__(self) -> tuple[Any, ...]:
        return plain_method, (self.module, self.method)


def plain_method(module: nn.Module, name: str) -> Callable[..., Any]:
    """The method that the module's class defines, bound to it."""
    return types.MethodType(getattr(type(module), name), module)


class CompiledForward(_StandIn):
    """A region's forward: the compiled form in training with grad enabled, the original otherwise."""

    def __init__(self, module: nn.Module, original: Callable[..., Any], compiled: Callable[..., Any]) -> None:
        super().__init__(module)
        self.original = original
        self.compiled = compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Dispatches one call."""
        if not (self.module.training and torch.is_grad_enabled()):
            return self.original(*args, **kwargs)
        try:
            return self.compiled(self.module, *args, **kwargs)
        except DynamoError as error:
            raise CaptureError(
                f"a {type(self.module).__name__} could not be captured as one graph and compiled: {error}"
            ) from error


class TrainingForward(_StandIn):
    """The whole model's forward: a training call keeps no key-value cache.

    transformers' ``use_cache=True`` default would hand each layer a cache object that training never reads; it is
    switched off in the configurations for the duration of a training call, and restored after it.

    Args:
        module: the model.
        original: its forward.
        training: what runs in training in its place, with the module as first argument; None for the original.
    """

    def __init__(
        self, module: nn.Module, original: Callable[..., Any], training: Callable[..., Any] | None = None
    ) -> None:
        super().__init__(module)
        self.original = original
        self.training = training

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Dispatches one call."""
        if not (self.module.training and torch.is_grad_enabled()):
            return self.original(*args, **kwargs)
        if kwargs.get("use_cache"):
            warnings.warn("use_cache=True is ignored in training: no key-value cache is kept", stacklevel=2)
            kwargs = {**kwargs, "use_cache": False}
        with _without_cache(self.module):
            if self.training is None:
                return self.original(*args, **kwargs)
            return self.training(self.module, *args, **kwargs)


class OpaqueForward(_StandIn):
    """The base model's forward, into which Dynamo does not look when it captures the head; its blocks are compiled."""

    def __init__(self, module: nn.Module, original: Callable[..., Any]) -> None:
        super().__init__(module)
        self.original = original

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The original forward."""
        return self.original(*args, **kwargs)


class ClearingZeroGrad(_StandIn):
    """The whole model's ``zero_grad``: forgets projected gradients too, which are no parameter's ``.grad``."""

    method = "zero_grad"

    def __init__(self, module: nn.Module, zero_grad: Callable[..., None]) -> None:
        super().__init__(module)
        self._zero_grad = zero_grad

    def __call__(self, set_to_none: bool = True) -> None:
        """As ``nn.Module.zero_grad``."""
        plain_method(self.module, self.method)(set_to_none)
        self._zero_grad(set_to_none)


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found if getattr(config, "use_cache", False)}
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs.values():
            config.use_cache = True
