"""Whether the model accepts a sample, tried on a fake copy: nothing is computed, nothing is changed."""

import torch
from torch import nn

from galore_fx.as_if_real import as_if_real
from galore_fx.errors import ModelError
from galore_fx.fake_model import fake_batch, fake_copy, fake_mode
from galore_fx.runtime.compatibility import DataDependentOutput
from galore_fx.sample import describe_sample


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
