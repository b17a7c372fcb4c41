"""Defines every error that a user can cause. Each message gives the value, the allowed ones and the next step."""


class GaloreFxError(Exception):
    """Base class of all errors that galore_fx raises deliberately."""


class SettingError(GaloreFxError, ValueError):
    """A recipe, an override, a budget or another setting cannot be used."""


class ModelError(GaloreFxError, ValueError):
    """A model cannot be compiled, or does not accept its sample."""


class OptimizerError(GaloreFxError, ValueError):
    """An optimizer does not belong to the model, or its step cannot be lowered."""


class BudgetError(GaloreFxError, ValueError):
    """No plan fits the budget; the message gives the bytes of the smallest plan, in total and by category."""


class CaptureError(GaloreFxError, RuntimeError):
    """A block of the model could not be captured as one graph."""


class UsageError(GaloreFxError, RuntimeError):
    """A call comes at the wrong time, though valid in itself (a second backward before ``step()``, ...)."""
