"""Hooks that others have set, on every module or on a gradient, and transformers' collector of outputs."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch


def has_global_module_hooks() -> bool:
    """Whether hooks of ``torch.nn.modules.module.register_module_*`` run around every module."""
    module = torch.nn.modules.module
    return any(getattr(module, name, None) for name in _GLOBAL_HOOKS)


_GLOBAL_HOOKS = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
)


def captures_outputs() -> bool:
    """Whether transformers is collecting what modules return, as it does for ``output_hidden_states=True``."""
    collector = _collector()
    return collector is not None and bool(collector.get())


@contextlib.contextmanager
def idle_collector() -> Iterator[None]:
    """Within it Dynamo can trace the hooks that transformers leaves on modules once it has collected outputs.

    They look up a context variable, which it cannot, unless they are told that something is being compiled.
    """
    collector = _collector()
    if collector is None:
        yield
        return
    before = collector.compiling, collector.global_var
    collector.compiling, collector.global_var = True, None
    try:
        yield
    finally:
        collector.compiling, collector.global_var = before


def _collector() -> Any:
    module = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(module, "_active_collector", None)
    return collector if hasattr(collector, "compiling") and hasattr(collector, "global_var") else None


def has_gradient_hooks(tensor: torch.Tensor) -> bool:
    """Whether there are hooks of ``register_hook`` on a leaf, which may exchange its gradient."""
    return bool(tensor._backward_hooks)
