"""Who runs when a region of the model is called: its compiled form, or the forward it came with.

    training, grad enabled                  ->  compiled region (one per forward function, shared by its layers)
    that cannot be captured; eval with grad  ->  the eager form: the original forward with projected linears
    no_grad, inference_mode, generate()     ->  the original forward

Each model's blocks have their own code objects, since Dynamo keeps its variants per code object and would otherwise run
out of them when several models share the class of a layer.
"""

import functools
import inspect
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from galore_fx.errors import CaptureError, UsageError
from galore_fx.runtime.foreign_hooks import captures_outputs, has_global_module_hooks
from galore_fx.runtime.formats.quantized_tensor import plain_tensors
from galore_fx.runtime.layers.eager_fallback import run_eager
from galore_fx.runtime.layers.normalized_linear import with_merged_weights
from galore_fx.runtime.torch_private import DynamoError, in_backward, refuse_unsupported_modes


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


class RegionFunction:
    """The compiled form of one forward function, for all blocks that use it.

    Attributes:
        failure: why it is not used any more, None while it is.

    Args:
        compiled: takes the block and the arguments of its forward.
        strict: raise where the block cannot be captured, and do not fall back.
    """

    def __init__(self, compiled: Callable[..., Any], strict: bool) -> None:
        self.failure: str | None = None
        self._compiled = compiled
        self._strict = strict

    def __call__(self, name: str, module: nn.Module, eager: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs one block compiled; in the eager form from the first time on that it cannot be captured.

        Raises:
            CaptureError: it cannot be captured, with ``strict``.
        """
        if self.failure is None:
            refuse_unsupported_modes()
            if has_global_module_hooks():
                _name_global_hooks()
                return eager(module, *args, **kwargs)
            if captures_outputs():  # by hooks that write into a list, for this call
                return eager(module, *args, **kwargs)
            try:
                return self._compiled(module, *args, **kwargs)
            except (DynamoError, CaptureError) as error:
                where = f"block {name}" if name else "the model"
                message = f"{where} ({type(module).__name__}) could not be captured as one graph: {_reason(error)}"
                if self._strict:
                    raise CaptureError(message) from error
                # The block's own error, if it has one, is raised here and says more than Dynamo's.
                result = eager(module, *args, **kwargs)
                self.failure = message
                warnings.warn(
                    f"{message}. It trains uncompiled from now on, as do the blocks that share its forward: the same "
                    "gradients, slower, and with more activations kept. strict=True makes this an error",
                    stacklevel=2,
                )
                return result
        return eager(module, *args, **kwargs)


@functools.cache
def _name_global_hooks() -> None:
    warnings.warn(
        "hooks of register_module_forward_hook and the like run around every module, and no compiled block runs them: "
        "while there are any, blocks train uncompiled, with the same gradients",
        stacklevel=4,
    )


def _reason(error: Exception) -> str:
    """The telling lines of an error of Dynamo's or of a pass's."""
    inner: BaseException = error
    while isinstance(inner, DynamoError) and (inner.__cause__ or getattr(inner, "inner_exception", None)):
        inner = getattr(inner, "inner_exception", None) or inner.__cause__ or inner
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    told = lines[:1] + [line for line in lines if line.startswith(("Explanation:", "CaptureError:"))][:1]
    return " ".join(told) or type(inner).__name__


class CompiledForward(_StandIn):
    """A region's forward: which form of it runs now.

    Attributes:
        function: its compiled form, set before the first call.
    """

    function: RegionFunction

    def __init__(self, name: str, module: nn.Module, original: Callable[..., Any]) -> None:
        super().__init__(module)
        self.name = name
        self.original = original
        self._ran_without_grad = False

    # Opaque to an outer torch.compile, which would otherwise look into it and lose the projected gradients.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Dispatches one call."""
        recomputes = in_backward()
        if not torch.is_grad_enabled():
            self._ran_without_grad = self.module.training
            return self.original(*args, **kwargs)
        # A reentrant checkpoint runs its forward without grad: the recomputation must draw the same dropout.
        if not self.module.training or (recomputes and self._ran_without_grad):
            return run_eager(self.module, self.original, *args, **kwargs)
        if not recomputes:
            self._ran_without_grad = False
        return self.function(self.name, self.module, self._eager, *args, **kwargs)

    def _eager(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return run_eager(module, self.original, *args, **kwargs)


class TrainingForward(_StandIn):
    """The whole model's forward: a training call keeps no key-value cache.

    transformers' ``use_cache=True`` default would hand each layer a cache object that training never reads; it is
    switched off in the configurations for the duration of a training call, and restored after it.

    Args:
        module: the model.
        original: its forward.
        training: what runs in training in its place, with the module as first argument; None for the original.

    Attributes:
        check: called with the arguments of each training call before it runs; raises what it refuses.
    """

    def __init__(
        self, module: nn.Module, original: Callable[..., Any], training: Callable[..., Any] | None = None
    ) -> None:
        super().__init__(module)
        self.check: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None
        self.original = original
        self.training = training
        self._ran_in_eval = self._told_of_eval = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Dispatches one call."""
        if not (self.module.training and torch.is_grad_enabled()):
            self._ran_in_eval = torch.is_grad_enabled()
            return self.original(*args, **kwargs)
        self._ran_in_eval = False
        refuse_unsupported_modes()
        if self.check is not None:
            self.check(args, kwargs)
        if kwargs.get("use_cache"):
            warnings.warn("use_cache=True is ignored in training: no key-value cache is kept", stacklevel=2)
            kwargs = {**kwargs, "use_cache": False}
        with _without_cache(self.module):
            if self.training is not None and not has_global_module_hooks():
                try:
                    return self.training(self.module, *args, **kwargs)
                except DynamoError as error:
                    # The model's own error, if it has one, is raised here and is no reason to give up.
                    result = self.original(*args, **kwargs)
                    self.training = None
                    warnings.warn(
                        f"head and loss of the {type(self.module).__name__} could not be captured: {_reason(error)}. "
                        "They run as they are; logits are formed as a whole",
                        stacklevel=2,
                    )
                    return result
            return self.original(*args, **kwargs)

    def warn_of_eval(self, *_given: object) -> None:
        """Called before each update: says once that a model is trained in eval mode."""
        if self._ran_in_eval and not self.module.training and not self._told_of_eval:
            self._told_of_eval = True
            warnings.warn(
                f"this {type(self.module).__name__} is trained in eval mode: uncompiled, and planned by no budget. "
                "Call model.train() first (from_pretrained returns a model in eval mode)",
                stacklevel=4,
            )


class OpaqueForward(_StandIn):
    """The forward of a part that holds blocks, into which Dynamo does not look when it captures head and loss."""

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


class FixedPlace(_StandIn):
    """The model's ``_apply``, which ``to``, ``cuda``, ``half`` and the like call: it may change nothing."""

    method = "_apply"

    def __call__(self, fn: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        """Lets a call pass that leaves the parameters where and as they are; buffers stay in any case.

        Raises:
            UsageError: a parameter would move, be cast or be replaced.
        """
        parameters = list(self.module.parameters())
        for dtype, device in {(parameter.dtype, parameter.device) for parameter in parameters}:
            probe = torch.empty(0, dtype=dtype, device=device)
            made = fn(probe)
            if made is not probe:
                raise UsageError(
                    f"parameters of this model are compiled in {dtype} on {device} and cannot become {made.dtype} on "
                    f"{made.device}: bases, states and graphs would stay. Move and cast it before galore_fx.compile"
                )
        for parameter in parameters:
            if type(parameter) is nn.Parameter:
                fn(parameter)  # share_memory_
        return self.module


class PlainSave(_StandIn):
    """The model's ``save_pretrained`` (transformers): ordinary weights where it holds quantised or normalised ones."""

    method = "save_pretrained"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the model holds such weights, too."""
        return PlainSave(memo[id(self.module)])

    def __reduce__(self) -> tuple[Any, ...]:
        return PlainSave, (self.module,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' ``save_pretrained``; the state given, or else the model's, is made ordinary first."""
        given = self.__signature__.bind(*args, **kwargs)
        state = given.arguments.get("state_dict") or self.module.state_dict()
        given.arguments["state_dict"] = plain_tensors(with_merged_weights(self.module, state))
        return plain_method(self.module, self.method)(*given.args, **given.kwargs)


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
