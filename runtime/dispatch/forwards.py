"""Replaced methods of a compiled model. The forward of a block chooses the form that runs:

    training, grad enabled                           ->  compiled region, one per forward function and shared by layers
    training, region not capturable; eval with grad  ->  eager form: the original forward with projected linears
    no_grad, inference_mode, generate()              ->  the original forward

The blocks of each model have their own code objects. Dynamo limits recompilations per code object, and models that
share the class of a layer would otherwise reach that limit.
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
    """Replaces a method of one module; a copied or pickled module gets the method of its class back."""

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
    """Returns the method that the module's class defines, bound to the module."""
    return types.MethodType(getattr(type(module), name), module)


class RegionFunction:
    """The compiled form of one forward function, for all blocks that use it.

    Attributes:
        failure: reason why the compiled form is no longer used; None while it is in use.

    Args:
        compiled: compiled function; takes the block and the arguments of its forward.
        strict: raise if a block cannot be captured, instead of falling back to the eager form.
    """

    def __init__(self, compiled: Callable[..., Any], strict: bool) -> None:
        self.failure: str | None = None
        self._compiled = compiled
        self._strict = strict

    def __call__(self, name: str, module: nn.Module, eager: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs one block compiled, or in the eager form once a capture has failed.

        Args:
            name: name of the block, "" for the whole model.
            module: the block.
            eager: its eager form; takes the block and the arguments of its forward.
            *args, **kwargs: arguments of the forward.

        Raises:
            CaptureError: the block cannot be captured and ``strict`` is set.
            SettingError: a mode of torch is on that compiled blocks do not support.
        """
        if self.failure is None:
            refuse_unsupported_modes()
            if has_global_module_hooks():
                _name_global_hooks()
                return eager(module, *args, **kwargs)
            if captures_outputs():  # during this call, by hooks that append to a list
                return eager(module, *args, **kwargs)
            try:
                return self._compiled(module, *args, **kwargs)
            except (DynamoError, CaptureError) as error:
                where = f"block {name}" if name else "the model"
                message = f"{where} ({type(module).__name__}) could not be captured as one graph: {_reason(error)}"
                if self._strict:
                    raise CaptureError(message) from error
                # An error of the block itself is raised here; it is clearer than Dynamo's.
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
    """Returns the informative lines of an error from Dynamo or from a pass."""
    inner: BaseException = error
    while isinstance(inner, DynamoError) and (inner.__cause__ or getattr(inner, "inner_exception", None)):
        inner = getattr(inner, "inner_exception", None) or inner.__cause__ or inner
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    told = lines[:1] + [line for line in lines if line.startswith(("Explanation:", "CaptureError:"))][:1]
    return " ".join(told) or type(inner).__name__


class CompiledForward(_StandIn):
    """Forward of a region that chooses the form to run at each call.

    Attributes:
        function: the compiled form; set before the first call.

    Args:
        name: name of the region, "" for the whole model.
        module: module of the region.
        original: its previous forward.
    """

    function: RegionFunction

    def __init__(self, name: str, module: nn.Module, original: Callable[..., Any]) -> None:
        super().__init__(module)
        self.name = name
        self.original = original
        self._ran_without_grad = False

    # Opaque to an outer torch.compile, which would otherwise trace it and lose the projected gradients.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the form that fits the current mode; see the module docstring."""
        recomputes = in_backward()
        if not torch.is_grad_enabled():
            self._ran_without_grad = self.module.training
            return self.original(*args, **kwargs)
        # A reentrant checkpoint runs its forward without grad; its recomputation must draw the same dropout.
        if not self.module.training or (recomputes and self._ran_without_grad):
            return run_eager(self.module, self.original, *args, **kwargs)
        if not recomputes:
            self._ran_without_grad = False
        return self.function(self.name, self.module, self._eager, *args, **kwargs)

    def _eager(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return run_eager(module, self.original, *args, **kwargs)


class TrainingForward(_StandIn):
    """Forward of the whole model; a training call keeps no key-value cache.

    With transformers' default ``use_cache=True`` each layer would get a cache object that training never reads. The
    setting is off in the model's configurations during a training call and restored afterwards.

    Args:
        module: the model.
        original: its forward.
        training: replaces the forward in training and takes the module first; None for the original forward.

    Attributes:
        check: called with the arguments before each training call; raises if it rejects them.
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
        """Runs a training call without cache, any other call with the original forward.

        Raises:
            SettingError: a mode of torch is on that compiled blocks do not support.
        """
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
                    # An error of the model itself is raised here; the compiled head then stays in use.
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
        """Warns once if the model is trained in eval mode; called before each update."""
        if self._ran_in_eval and not self.module.training and not self._told_of_eval:
            self._told_of_eval = True
            warnings.warn(
                f"this {type(self.module).__name__} is trained in eval mode: uncompiled, and planned by no budget. "
                "Call model.train() first (from_pretrained returns a model in eval mode)",
                stacklevel=4,
            )


class OpaqueForward(_StandIn):
    """Forward of a module that contains blocks; Dynamo does not trace it when it captures head and loss."""

    def __init__(self, module: nn.Module, original: Callable[..., Any]) -> None:
        super().__init__(module)
        self.original = original

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the original forward."""
        return self.original(*args, **kwargs)


class ClearingZeroGrad(_StandIn):
    """``zero_grad`` of the whole model; also clears projected gradients, which are not in a parameter's ``.grad``."""

    method = "zero_grad"

    def __init__(self, module: nn.Module, zero_grad: Callable[..., None]) -> None:
        super().__init__(module)
        self._zero_grad = zero_grad

    def __call__(self, set_to_none: bool = True) -> None:
        """Clears all gradients, like ``nn.Module.zero_grad``."""
        plain_method(self.module, self.method)(set_to_none)
        self._zero_grad(set_to_none)


class FixedPlace(_StandIn):
    """``_apply`` of the model, used by ``to``, ``cuda`` and ``half``; rejects any change of the parameters."""

    method = "_apply"

    def __call__(self, fn: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        """Accepts a call that keeps device and dtype of the parameters; buffers are never changed.

        Raises:
            UsageError: a parameter would be moved, cast or replaced.
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
    """``save_pretrained`` (transformers) of the model; writes ordinary weights for quantised and normalised ones."""

    method = "save_pretrained"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Returns the same for a copy of the model, which has such weights too."""
        return PlainSave(memo[id(self.module)])

    def __reduce__(self) -> tuple[Any, ...]:
        return PlainSave, (self.module,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls transformers' ``save_pretrained`` on the given or the model's state, with ordinary weights."""
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
