"""What a user may ask of an optimizer: which rule, which hyper-parameters and which parameters make sense."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gmn_optim.errors import CaptureError, InvalidArgumentError, InvalidParameterError, ModelExpectedError, WeightsError
from gmn_optim.rule import RuleConfig, UpdateRule
from gmn_optim.rule.nominal import largest_element_of
from gmn_optim.weights import Weights, load_weights

DEFAULT_NOMINAL = "adam"
"""The nominal term of an optimizer without weights."""

FOREIGN_OPTIONS = (
    "betas",
    "eps",
    "amsgrad",
    "dampening",
    "nesterov",
    "foreach",
    "fused",
    "capturable",
    "differentiable",
)
"""Options of torch's optimizers that have no counterpart here."""


def choose_rule(weights: str | Path | Weights | UpdateRule | None, nominal: str) -> tuple[UpdateRule, str]:
    """Return the rule and the identity that a saved state must match.

    Raises:
        InvalidArgumentError: ``weights`` is of no kind that names a rule.
        UnknownNameError: no such weights or nominal term.
        WeightsError: the weights cannot be used.

    Example:
        >>> rule, identity = choose_rule(None, "adam")
        >>> identity, rule.config.body is None
        ('adam', True)
    """
    if weights is None:
        config = RuleConfig(nominal=nominal, body=None, alpha=1.0, largest_element=largest_element_of(nominal))
        return UpdateRule(config).requires_grad_(False), nominal
    if nominal != DEFAULT_NOMINAL:
        raise InvalidArgumentError(
            f"nominal is {nominal!r} beside weights, which have a nominal term: add weights=None"
        )
    if isinstance(weights, UpdateRule):
        return weights, f"{weights.config.arm} (not from a file)"
    if not isinstance(weights, Weights):
        if not isinstance(weights, str | Path):
            raise InvalidArgumentError(f"weights is {weights!r}; expected a name, a path, loaded weights or None")
        weights = load_weights(weights)
    return weights.rule, weights.identity


def default_lr(weights: object, rule: UpdateRule) -> float:
    """Return the lr where the user names none: as meta-trained, or the ordinary step size of a nominal term alone.

    Example:
        >>> default_lr(None, choose_rule(None, "adam")[0])
        0.003
    """
    return 1.0 if weights is not None else rule.nominal.default_alpha


def require_model(model: object) -> None:
    """Raise if a model is not a module.

    Raises:
        ModelExpectedError: it is something else, such as its parameters.

    Example:
        >>> require_model(nn.Linear(2, 1))
    """
    if not isinstance(model, nn.Module):
        raise ModelExpectedError(
            f"GMNOptimizer needs the model itself, got {type(model).__name__}: parameters alone do not show each data "
            "point's gradient. Write GMNOptimizer(model) instead of GMNOptimizer(model.parameters())."
        )


def require_valid_group(group: Mapping[str, Any]) -> None:
    """Raise if a hyper-parameter of a group makes no sense, or is one of another optimizer.

    Raises:
        InvalidArgumentError: one does not; all such are named.

    Example:
        >>> require_valid_group({"lr": 1.0, "weight_decay": 0.0, "momentum": None})
    """
    lr, decay, momentum = group["lr"], group["weight_decay"], group["momentum"]
    faults = []
    if isinstance(lr, Tensor) and lr.numel() != 1:
        faults.append(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
    elif not isinstance(lr, Tensor | int | float) or not 0.0 <= float(lr) < math.inf:
        faults.append(f"Invalid learning rate: {lr}")
    if not isinstance(decay, int | float) or not 0.0 <= decay < math.inf:
        faults.append(f"Invalid weight_decay value: {decay}")
    if momentum is not None and not (isinstance(momentum, Tensor | int | float) and 0.0 <= momentum < 1.0):
        faults.append(f"Invalid momentum value: {momentum}; expected None or a decay within [0, 1)")
    # schedulers and users put keys of their own into groups, and False asks for nothing
    foreign = [name for name in FOREIGN_OPTIONS if group.get(name)]
    if foreign:
        faults.append(f"no option of GMNOptimizer: {', '.join(foreign)}; leave out what belongs to another optimizer")
    if faults:
        raise InvalidArgumentError("; ".join(faults))


def require_trainable(parameters: Iterable[Tensor]) -> None:
    """Raise if a parameter is of a kind that the rule cannot update.

    Raises:
        InvalidParameterError: one is complex, sparse, not floating or without values.

    Example:
        >>> require_trainable(nn.Linear(2, 1).parameters())
    """
    faults = [fault for fault in map(_fault, parameters) if fault is not None]
    if faults:
        raise InvalidParameterError("; ".join(faults[:3]) + " cannot be trained here: leave them out of params")


def _fault(parameter: Tensor) -> str | None:
    """Say why a parameter cannot be trained, if it cannot."""
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        return "a parameter of a lazy layer has no shape yet (call the model once first) and"
    what = f"parameter of shape {tuple(parameter.shape)}"
    if parameter.is_meta:
        return f"{what} has no values (it is on the meta device; call model.to_empty(device=...) first) and"
    if parameter.is_complex():
        return f"{what} is complex ({parameter.dtype})"
    if parameter.layout != torch.strided:
        return f"{what} is sparse ({parameter.layout})"
    if not parameter.is_floating_point():
        return f"{what} is not floating point ({parameter.dtype})"
    return None


def require_own_parameters(model: nn.Module, groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise if no parameter in the groups belongs to the model.

    Raises:
        InvalidParameterError: none does.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> require_own_parameters(model, [{"params": [model.bias]}])
    """
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in groups for parameter in group["params"]):
        raise InvalidParameterError(
            "none of the parameters belongs to the model; give GMNOptimizer the model whose parameters they are"
        )


def require_one_process() -> None:
    """Raise if several processes train together: each sees the factors of its own data points only.

    Raises:
        CaptureError: they do.

    Example:
        >>> require_one_process()
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        count = torch.distributed.get_world_size()
        if count > 1:
            raise CaptureError(
                f"{count} processes train together; each has the factors of its own data points only, so that their "
                "parameters would drift apart. Train in one process, or with weights=None."
            )


def require_one_device(groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise if the parameters that take part in a step are on several devices.

    Raises:
        InvalidParameterError: they are.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> model(torch.ones(3, 2)).sum().backward()
        >>> require_one_device([{"params": model.parameters()}])
    """
    devices = {parameter.device for group in groups for parameter in group["params"] if parameter.grad is not None}
    if len(devices) > 1:
        raise InvalidParameterError(
            f"parameters with a gradient are on {' and '.join(sorted(map(str, devices)))}; an optimizer trains on one "
            "device: move the model to one, or make an optimizer for each with its own params"
        )


def require_same_weights(wanted: str, groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise if the groups of a saved state name other weights, or are those of another optimizer.

    Raises:
        WeightsError: they do, or are.

    Example:
        >>> require_same_weights("adam", [{"weights": "adam"}, {}])
    """
    for group in groups:
        foreign = [name for name in FOREIGN_OPTIONS if name in group]
        if foreign and "weights" not in group:
            raise WeightsError(
                f"the state was made by another optimizer (its groups have {', '.join(foreign)}); start without it: "
                "this optimizer cannot continue it"
            )
        if group.get("weights", wanted) != wanted:
            raise WeightsError(
                f"the state was made with weights {group['weights']!r}, this optimizer has {wanted!r}; make it "
                "with the same weights, or start without the state"
            )
