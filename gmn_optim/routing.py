"""What takes part in a step: parameters with a usable gradient, and warnings of layers that no factors explain."""

import math
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from gmn_optim.capture import GradientCapture, Verification
from gmn_optim.errors import CaptureWarning, InvalidParameterError
from gmn_optim.places import NOWHERE, ActiveParameter, Groups, Place, parameters_in
from gmn_optim.report import StepLog


def warn_of_misses(
    verdicts: Mapping[str, Verification], warned: set[str], capture: GradientCapture, groups: Groups
) -> None:
    """Warn of layers whose gradient is not explained, of each once, if a parameter of theirs is trained here.

    Args:
        verdicts: On each layer.
        warned: Layers that were warned of before; those warned of now are added.
        capture: Knows the layers' parameters.
        groups: The optimizer's groups.

    Example:
        >>> with GradientCapture(torch.nn.Linear(2, 1)) as capture:
        ...     warn_of_misses({"": Verification(False, 0.0, 1.0, "its weight is shared")}, {""}, capture, [])
    """
    missed = {n: verdict.reason for n, verdict in verdicts.items() if not verdict.explained and n not in warned}
    if missed:
        trained = {id(parameter) for parameter in parameters_in(groups)}
        served = capture.served_parameters()
        missed = {n: r for n, r in missed.items() if any(id(p) in trained for p in served.get(n, {}).values())}
    warned.update(missed)
    if missed:
        listed = "; ".join(f"layer {name!r}: {reason}" for name, reason in missed.items())
        _warn_caller(
            f"no factors explain the gradient of {listed}. The nominal term alone updates it. To silence: "
            "warnings.filterwarnings('ignore', category=gmn_optim.errors.CaptureWarning).",
            CaptureWarning,
        )


def find_active(
    names: Mapping[int, str], groups: Groups, places: Mapping[int, Place], log: StepLog
) -> list[ActiveParameter]:
    """Return the parameters with a usable gradient; count the others, and warn of each once.

    Args:
        names: Parameter identity to name.
        groups: The optimizer's groups.
        places: Parameter identity to its place in the model.
        log: Where the others are counted.

    Raises:
        InvalidParameterError: a gradient is sparse.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> weight.grad = torch.ones(2)
        >>> [each.place.role for each in find_active({id(weight): "w"}, [{"params": [weight]}], {}, StepLog())]
        ['other']
    """
    found = {
        id(parameter): ActiveParameter(
            names[id(parameter)], parameter, group, number, places.get(id(parameter), NOWHERE)
        )
        for number, group in enumerate(groups)
        for parameter in group["params"]
        if parameter.grad is not None and parameter.numel()
    }
    with_gradient = [*found.values()]  # torch lets a parameter stand twice in a group
    _require_dense(with_gradient)
    verdicts = are_usable([each.parameter.grad for each in with_gradient])
    for each, usable in zip(with_gradient, verdicts, strict=True):
        if not usable:
            _skip(each.name, log)
    return [each for each, usable in zip(with_gradient, verdicts, strict=True) if usable]


def _require_dense(found: Iterable[ActiveParameter]) -> None:
    """Raise if gradients are sparse."""
    sparse = [each.name for each in found if each.parameter.grad.layout != torch.strided]
    if sparse:
        raise InvalidParameterError(f"gradients of {', '.join(sparse)} are sparse; make their layers with sparse=False")


def _skip(name: str, log: StepLog) -> None:
    """Count a parameter left alone because its gradient is not usable, with a warning at its first time."""
    log.skipped[name] += 1
    if log.skipped[name] == 1:
        _warn_caller(
            f"the gradient of {name!r} is not finite, or its squares are not; the parameter is left as it is",
            UserWarning,
        )


def are_usable(gradients: Sequence[Tensor]) -> list[bool]:
    """Return whether each gradient is finite, and far enough from overflow for its squares, mostly with one transfer.

    Example:
        >>> are_usable([torch.ones(2), torch.tensor([1.0, float("nan")]), torch.tensor([1e25])])
        [True, False, False]
    """
    if not gradients:
        return []
    # no element is larger than the norm, which is quick to take; in a sum large elements may cancel
    norms = [torch.linalg.vector_norm(gradient).to(gradients[0].device) for gradient in gradients]
    found = zip(gradients, torch.stack(norms).tolist(), strict=True)
    return [norm < _limit(each) or bool((each.abs() < _limit(each)).all()) for each, norm in found]


def _limit(gradient: Tensor) -> float:
    """Return what elements of a gradient must stay below for squares, in the dtype of the computation, to be finite."""
    computed = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    return 0.1 * math.sqrt(torch.finfo(computed).max)


def _warn_caller(message: str, category: type[Warning]) -> None:
    """Warn at the line that called ``step``, below the wrappers that torch and its schedulers put around it."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and _is_internal(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _is_internal(module: str) -> bool:
    """Whether a module is part of this package, of torch, or of a library that calls ``step`` for the user."""
    return module.partition(".")[0] in ("gmn_optim", "torch", "accelerate", "lightning", "transformers")
