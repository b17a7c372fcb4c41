"""Every error a user can cause, in one place. Each message names the value, what is allowed, and what to do next."""


class GaloreFxError(Exception):
    """Base class of all errors raised on purpose by galore_fx."""


class SettingError(GaloreFxError, ValueError):
    """A recipe, an override or a budget that cannot be used."""


class ModelError(GaloreFxError, ValueError):
    """A model, or a sample for it, that cannot be compiled."""


class OptimizerError(GaloreFxError, ValueError):
    """An optimizer that does not belong to the model, or whose step cannot be lowered."""


class BudgetError(GaloreFxError, ValueError):
    """No plan fits the budget; the message says what the smallest one needs and what forms it."""


class CaptureError(GaloreFxError, RuntimeError):
    """A region of the model could not be captured as one graph."""


class UsageError(GaloreFxError, RuntimeError):
    """A call that is right by itself, but wrong at this moment (a second backward before ``step()``, ...)."""
