"""Copies a model and a batch to fake tensors on the CPU, which have shapes and dtypes but no memory."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from galore_fx.errors import ModelError
from galore_fx.runtime.torch_private import DataDependentOutput, FakeCopyMode, FakeTensorMode, ShapeEnv
from galore_fx.simulation.fake_run import as_if_real
from galore_fx.simulation.sample import call_arguments, describe_sample


def fake_mode() -> FakeTensorMode:
    """Returns a fake tensor mode in which every size is a number, not a symbol."""
    return FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True, allow_non_fake_inputs=True)


def fake_copy(
    model: nn.Module, mode: FakeTensorMode, copier: Callable[[nn.Module], nn.Module] = copy.deepcopy
) -> nn.Module:
    """Returns a fake copy of the model in its state before any compilation, in training mode.

    Parameters and buffers on the meta device or a GPU become fake CPU tensors, since fake GPU tensors need a GPU build
    of torch.

    Args:
        model: any module.
        mode: mode of the fake tensors.
        copier: function that copies the model.

    Raises:
        ModelError: the model is not an ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"a {type(model).__name__} is not an nn.Module")
    with warnings.catch_warnings(), FakeCopyMode(mode):
        warnings.simplefilter("ignore")  # the copy of a compiled model is plain on purpose
        fake = copier(model)
    vars(fake).pop("galore_fx", None)
    moved: dict[int, Tensor] = {}
    for module in fake.modules():
        for tensors in (module._parameters, module._buffers):
            for name, value in tensors.items():
                if value is not None and value.device.type != "cpu":
                    tensors[name] = moved.setdefault(id(value), _on_cpu(value, mode))  # type: ignore[assignment]
    return fake.train()


def meta_copy(model: nn.Module) -> nn.Module:
    """Returns a copy on the meta device, without memory, of the model in its state before any compilation."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        made = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the copy of a compiled model is plain on purpose
        copied = copy.deepcopy(model, memo)
    vars(copied).pop("galore_fx", None)
    return copied


def _on_cpu(value: Tensor, mode: FakeTensorMode) -> Tensor:
    with mode:
        made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
    return nn.Parameter(made, value.requires_grad) if isinstance(value, nn.Parameter) else made


def fake_batch(sample: object, mode: FakeTensorMode) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns a sample as fake arguments and keywords of the model's forward; a tensor passed twice stays one."""
    made: dict[int, Tensor] = {}

    def as_fake(value: Any) -> Any:
        if isinstance(value, Tensor) and id(value) not in made:
            with mode:
                fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
                made[id(value)] = fake.requires_grad_(value.requires_grad)
        return made.get(id(value), value)

    return call_arguments(sample, as_fake)


def check_sample(model: nn.Module, sample: object) -> None:
    """Runs the model's forward on fake copies of its parameters and of the sample.

    Args:
        model: any module.
        sample: a training batch. A mapping is passed as keywords, a tuple or list as positional arguments, anything
            else as the only argument.

    Raises:
        ModelError: the model is not an ``nn.Module`` or does not accept the sample; quotes the model's own error.
    """
    mode = fake_mode()
    fake = fake_copy(model, mode)
    args, kwargs = fake_batch(sample, mode)
    try:
        with mode, as_if_real(), torch.no_grad():
            fake(*args, **kwargs)
    except DataDependentOutput:
        # The model reads values of its input, which fake tensors lack; only the first real call can show an error.
        return
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} does not accept the sample {describe_sample(sample)}: "
            f"{type(error).__name__}: {error}. "
            "Give a batch as the model takes it in training, for example dict(input_ids=ids, labels=ids)"
        ) from error
