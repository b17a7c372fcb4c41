"""Whether what the user hands over is a model that can be compiled."""

from torch import nn

from galore_fx.errors import ModelError


def is_compiled(model: object) -> bool:
    """Whether a model trains through galore_fx. The copy of one does not."""
    return bool(getattr(type(getattr(model, "galore_fx", None)), "trains_its_model", False))


def check_model(model: object) -> None:
    """Whether it is a module, and not one that torch.compile or galore_fx has compiled.

    Raises:
        ModelError: says what it is and what to give.
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
