"""A model and a batch as fake tensors on the CPU: shapes and dtypes without a byte behind them."""

import copy
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from galore_fx.errors import ModelError
from galore_fx.runtime.compatibility import FakeCopyMode, FakeTensor, FakeTensorMode, ShapeEnv, TorchDispatchMode
from galore_fx.sample_check import call_arguments


def fake_mode() -> FakeTensorMode:
    """A mode in which all sizes are numbers."""
    return FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True, allow_non_fake_inputs=True)


def fake_copy(
    model: nn.Module, mode: FakeTensorMode, copier: Callable[[nn.Module], nn.Module] = copy.deepcopy
) -> nn.Module:
    """A copy of the model as it was before any compilation, in training mode.

    Parameters of the meta device or of a GPU become fake CPU tensors: fake GPU tensors need a GPU build of torch.

    Args:
        model: any model.
        mode: the fake tensors' mode.
        copier: makes the copy.

    Raises:
        ModelError: not a module.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"a {type(model).__name__} is not an nn.Module")
    with warnings.catch_warnings(), FakeCopyMode(mode):
        warnings.simplefilter("ignore")  # that the copy of a compiled model is plain is what is wanted
        fake = copier(model)
    vars(fake).pop("galore_fx", None)
    moved: dict[int, Tensor] = {}
    for module in fake.modules():
        for tensors in (module._parameters, module._buffers):
            for name, value in tensors.items():
                if value is not None and value.device.type != "cpu":
                    tensors[name] = moved.setdefault(id(value), _on_cpu(value, mode))  # type: ignore[assignment]
    return fake.train()


def _on_cpu(value: Tensor, mode: FakeTensorMode) -> Tensor:
    with mode:
        made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
    return nn.Parameter(made, value.requires_grad) if isinstance(value, nn.Parameter) else made


def fake_batch(sample: object, mode: FakeTensorMode) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and keywords of the model's forward, every tensor fake; one that is given twice stays one."""
    made: dict[int, Tensor] = {}

    def as_fake(value: Any) -> Any:
        if isinstance(value, Tensor) and id(value) not in made:
            with mode:
                made[id(value)] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
        return made.get(id(value), value)

    return call_arguments(sample, as_fake)


@contextmanager
def as_if_real() -> Iterator[None]:
    """Keeps a model on the branches that a healthy step on real tensors takes.

    A number that is read from a fake tensor has no value: a truth is answered with True, a float with a small positive
    number, an int with 0 ("no error"). transformers asks whether it is being traced, and would build attention masks
    that a training step does not build.
    """
    masking_utils = sys.modules.get("transformers.masking_utils")
    known = hasattr(masking_utils, "is_tracing")
    with mock.patch.object(masking_utils, "is_tracing", _is_compiling) if known else nullcontext(), _HealthyNumbers():
        yield


def _is_compiling(*_tensors: object) -> bool:
    return torch.compiler.is_compiling()


class _HealthyNumbers(TorchDispatchMode):
    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Dynamo compiles under this mode instead of skipping the frame."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            dtype = args[0].dtype
            return True if dtype is torch.bool else 1e-6 if dtype.is_floating_point else 0
        return func(*args, **(kwargs or {}))
