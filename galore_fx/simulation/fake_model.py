"""A model and a batch as fake tensors on the CPU: shapes and dtypes without a byte behind them."""

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


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy without memory of the model as it was before any compilation, its parameters on the meta device."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        made = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the copy of a compiled model is plain is what is wanted
        copied = copy.deepcopy(model, memo)
    vars(copied).pop("galore_fx", None)
    return copied


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
                fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
                made[id(value)] = fake.requires_grad_(value.requires_grad)
        return made.get(id(value), value)

    return call_arguments(sample, as_fake)


def check_sample(model: nn.Module, sample: object) -> None:
    """Runs the model's forward on fake copies of its parameters and of the sample.

    Args:
        model: any module.
        sample: a batch as the model takes it: a mapping is passed as keywords, a tuple or list as positions,
            anything else as the one argument.

    Raises:
        ModelError: the model does not accept it; quotes the model's own error.
    """
    mode = fake_mode()
    fake = fake_copy(model, mode)
    args, kwargs = fake_batch(sample, mode)
    try:
        with mode, as_if_real(), torch.no_grad():
            fake(*args, **kwargs)
    except DataDependentOutput:
        # The model looks into its input's values, which fake tensors have not; the first real call will tell.
        return
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} does not accept the sample {describe_sample(sample)}: "
            f"{type(error).__name__}: {error}. "
            "Give a batch as the model takes it in training, for example dict(input_ids=ids, labels=ids)"
        ) from error
