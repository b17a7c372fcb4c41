"""Whether the model accepts a sample, tried on fake tensors: nothing is computed, nothing is changed."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from galore_fx.as_if_real import as_if_real
from galore_fx.errors import ModelError
from galore_fx.runtime.compatibility import DataDependentOutput, FakeTensorMode, tree_map


def check_sample(model: nn.Module, sample: object) -> None:
    """Runs the model's forward on fake copies of its parameters and of the sample.

    Args:
        model: any module.
        sample: a batch as the model takes it: a mapping is passed as keywords, a tuple or list as positions,
            anything else as the one argument.

    Raises:
        ModelError: the model does not accept it; quotes the model's own error.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(value: Any) -> Any:
        return mode.from_tensor(value) if isinstance(value, Tensor) else value

    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    args, kwargs = call_arguments(sample, fake)
    try:
        with mode, as_if_real(), torch.no_grad():
            torch.func.functional_call(model, {name: fake(value) for name, value in state.items()}, args, kwargs)
    except DataDependentOutput:
        # The model looks into its input's values, which fake tensors have not; the first real call will tell.
        return
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} does not accept the sample {describe_sample(sample)}: "
            f"{type(error).__name__}: {error}. "
            "Give a batch as the model takes it in training, for example dict(input_ids=ids, labels=ids)"
        ) from error


def call_arguments(sample: object, convert: Callable[[Any], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A sample as arguments and keywords of the model's forward, each tensor in it converted."""
    if isinstance(sample, Mapping):
        return (), {key: tree_map(convert, value) for key, value in sample.items()}
    values = list(sample) if isinstance(sample, tuple | list) else [sample]
    return tuple(tree_map(convert, values)), {}


def describe_sample(sample: object) -> str:
    """Dtypes and shapes of a sample, for messages."""
    args, kwargs = call_arguments(sample, _describe)
    return str(kwargs or list(args))


def _describe(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def batch_size(sample: object, dim: int) -> int:
    """The size of a sample's first tensor in a dimension, 0 where it has none: sequences (0) or tokens (1)."""
    args, kwargs = call_arguments(sample, lambda value: value)
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    return tensors[0].shape[dim] if tensors and tensors[0].ndim > dim else 0


def shortened(sample: object, dim: int, size: int) -> object:
    """A sample with fewer sequences (0) or tokens (1): every tensor that has as many as the first one is cut."""
    before = batch_size(sample, dim)

    def cut(value: Any) -> Any:
        fits = isinstance(value, Tensor) and value.ndim > dim and value.shape[dim] == before
        return value.narrow(dim, 0, size) if fits else value

    args, kwargs = call_arguments(sample, cut)
    return kwargs or args
