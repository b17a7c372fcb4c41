"""Checks that the user's model can be compiled."""

from torch import nn

from galore_fx.errors import ModelError


def is_compiled(model: object) -> bool:
    """Whether a model trains through galore_fx; a copy of such a model does not."""
    return bool(getattr(type(getattr(model, "galore_fx", None)), "trains_its_model", False))


def check_model(model: object) -> None:
    """Checks that the model is an ``nn.Module`` that neither torch.compile nor galore_fx has compiled.

    Raises:
        ModelError: it is not; the message says what to pass instead.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"a {type(model).__name__} is not an nn.Module")
    if hasattr(model, "_orig_mod"):
        raise ModelError(
            "this is what torch.compile returned; give galore_fx.compile the module itself, or use "
            "torch.compile(model, backend='galore_fx') and galore_fx.optimizer(model)"
        )
    if is_compiled(model):
        raise ModelError(f"this {type(model).__name__} is compiled already; compile a fresh or deep-copied one")
