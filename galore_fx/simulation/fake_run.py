"""Makes a model on fake tensors take the branches that it takes on real ones."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from galore_fx.runtime.torch_private import FakeTensor, TorchDispatchMode


@contextmanager
def as_if_real() -> Iterator[None]:
    """Makes a model within the context take the branches of a healthy step on real tensors.

    A number read from a fake tensor has no value, so a bool reads as True, a float as a small positive number and an
    int as 0 ("no error"). transformers checks whether it is traced, and would build attention masks that a training
    step does not build. Its experts would call a kernel whose fake form supports bfloat16 only.
    """
    with ExitStack() as stack:
        for module, name, make in _ASKED:
            found = sys.modules.get(module)
            if hasattr(found, name):
                stack.enter_context(mock.patch.object(found, name, make(getattr(found, name))))
        stack.enter_context(_HealthyNumbers())
        yield


def _tracing_is_compiling(_is_tracing: Callable[..., bool]) -> Callable[..., bool]:
    return lambda *_tensors: torch.compiler.is_compiling()


def _bfloat16_only(can_use_grouped_mm: Callable[..., bool]) -> Callable[..., bool]:
    def can_use(input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> bool:
        return weight.dtype is torch.bfloat16 and can_use_grouped_mm(input, weight, offs)

    return can_use


# Functions of transformers whose answer depends on the kind of the tensors: module, name, replacement.
_ASKED = (
    ("transformers.masking_utils", "is_tracing", _tracing_is_compiling),
    ("transformers.integrations.moe", "_can_use_grouped_mm", _bfloat16_only),
)


class _HealthyNumbers(TorchDispatchMode):
    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Returns True, so that Dynamo compiles under this mode instead of skipping the frame."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            dtype = args[0].dtype
            return True if dtype is torch.bool else 1e-6 if dtype.is_floating_point else 0
        return func(*args, **(kwargs or {}))
