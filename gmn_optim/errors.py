"""Every error that this package raises on purpose.

Each class is both a :class:`GMNError`, so that one ``except`` catches all of them, and the builtin that a
reader of torch code expects. A message says what was found, what was expected and what to do.
"""


class GMNError(Exception):
    """Base of all errors of this package.

    Example:
        >>> import torch, gmn_optim
        >>> try:
        ...     gmn_optim.GMNOptimizer(torch.nn.Linear(1, 1), weights="defualt")
        ... except GMNError as error:
        ...     "Did you mean 'default'" in str(error)
        True
    """


class ModelExpectedError(GMNError, TypeError):
    """Parameters were given where the model itself is needed."""


class InvalidParameterError(GMNError, ValueError):
    """A parameter cannot be trained by this optimizer (complex, sparse, not in the model, no float)."""


class InvalidArgumentError(GMNError, ValueError):
    """An argument has a value that makes no sense; the message names it, the value and the valid range."""


class EvaluationModeError(GMNError, RuntimeError):
    """A step was asked for while the parameters are the averages that evaluation sees."""


class CaptureError(GMNError, RuntimeError):
    """Captured factors cannot be put together or do not belong to this model."""


class UnsupportedLayerError(GMNError, TypeError):
    """No adapter knows this layer kind; the message tells how to register one."""


class UnknownNameError(GMNError, KeyError):
    """A name is not registered; the message lists near matches."""

    def __str__(self) -> str:
        """Return the message itself (a ``KeyError`` would show it quoted)."""
        return str(self.args[0]) if self.args else ""


class WeightsError(GMNError, ValueError):
    """A weights file or its card cannot be used; the message says which of the two and why."""


class DataError(GMNError, ValueError):
    """A data file is missing, damaged, or has an unexpected shape."""


class CheckpointError(GMNError, ValueError):
    """A meta-training run, or a comparison, cannot be continued with these settings."""


class MetaTrainingError(GMNError, RuntimeError):
    """No inner training of an outer step could be carried out; the message tells what each of them raised."""


class CaptureWarning(UserWarning):
    """Factors of a layer are missing or do not explain its gradient; its nominal term is used instead.

    Example:
        >>> import warnings
        >>> warnings.filterwarnings("ignore", category=CaptureWarning)
    """
