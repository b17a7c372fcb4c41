"""Detects hooks set by other code, on all modules or on a gradient, and transformers' output collector."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch


def has_global_module_hooks() -> bool:
    """Returns whether global hooks (``torch.nn.modules.module.register_module_*``) are registered."""
    module = torch.nn.modules.module
    return any(getattr(module, name, None) for name in _GLOBAL_HOOKS)


_GLOBAL_HOOKS = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
)


def captures_outputs() -> bool:
    """Returns whether transformers is collecting module outputs, as it does for ``output_hidden_states=True``."""
    collector = _collector()
    return collector is not None and bool(collector.get())


@contextlib.contextmanager
def idle_collector() -> Iterator[None]:
    """Context in which Dynamo can trace the hooks that transformers leaves on modules after collecting outputs.

    The hooks read a context variable, which Dynamo cannot trace, unless the collector's ``compiling`` flag is set.
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
    """Returns whether a leaf has ``register_hook`` hooks, which may replace its gradient."""
    return bool(tensor._backward_hooks)
