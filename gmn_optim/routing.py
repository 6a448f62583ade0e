"""Who updates which parameter: the learned term where captured factors explain a gradient, else the nominal term."""

import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gmn_optim.capture import AbstractLayerAdapter, GradientCapture, Verification
from gmn_optim.capture.adapters import find_adapter, require_adapter
from gmn_optim.errors import CaptureWarning, InvalidParameterError
from gmn_optim.report import StepLog, Summary, SummaryRow
from gmn_optim.rule import RuleConfig

Groups = Sequence[Mapping[str, Any]]


class ActiveParameter(NamedTuple):
    """A parameter that takes part in a step.

    Attributes:
        name: Its full name.
        parameter: The parameter.
        group: The group that it is in.
        group_number: The group's number.
        layer: Name of the captured layer whose factors explain its gradient, or None.
        role: ``weight`` or ``bias`` of that layer; ``other`` if there is none.
    """

    name: str
    parameter: Tensor
    group: Mapping[str, Any]
    group_number: int
    layer: str | None
    role: str


def name_parameters(model: nn.Module, groups: Groups) -> dict[int, str]:
    """Return the name of every parameter that is trained, by its identity.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> list(name_parameters(model, [{"params": [*model.parameters(), nn.Parameter(torch.ones(1))]}]).values())
        ['weight', 'bias', 'group 0 parameter 2']
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for number, group in enumerate(groups):
        for place, parameter in enumerate(group["params"]):
            if id(parameter) not in names:
                names[id(parameter)] = f"group {number} parameter {place}"
    return names


# ---------------------------------------------------------------------- in one step


def warn_of_misses(reasons: Mapping[str, str], warned: set[str], capture: GradientCapture, groups: Groups) -> None:
    """Warn of layers whose gradient is not explained, of each once, if a parameter of theirs is trained here.

    Args:
        reasons: Layer name to why not; empty for a layer that is served.
        warned: Layers that were warned of before; those warned of now are added.
        capture: Knows the layers' parameters.
        groups: The optimizer's groups.

    Example:
        >>> with GradientCapture(nn.Linear(2, 1)) as capture:
        ...     warn_of_misses({"": "its weight is shared"}, {""}, capture, [])
    """
    missed = {name: reason for name, reason in reasons.items() if reason and name not in warned}
    if missed:
        trained = {id(parameter) for parameter in _parameters(groups)}
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
    names: Mapping[int, str], groups: Groups, served: Mapping[int, tuple[str, str]], log: StepLog
) -> list[ActiveParameter]:
    """Return the parameters with a usable gradient; count those whose gradient is not finite, and warn of them once.

    Args:
        names: Parameter identity to name.
        groups: The optimizer's groups.
        served: Parameter identity to the layer and role in which its factors are there and right.
        log: Where the others are counted.

    Raises:
        InvalidParameterError: a gradient is sparse.

    Example:
        >>> weight = nn.Parameter(torch.ones(2))
        >>> weight.grad = torch.ones(2)
        >>> [each.role for each in find_active({id(weight): "w"}, [{"params": [weight]}], {}, StepLog())]
        ['other']
    """
    with_gradient = [
        ActiveParameter(names[id(parameter)], parameter, group, number, *served.get(id(parameter), (None, "other")))
        for number, group in enumerate(groups)
        for parameter in group["params"]
        if parameter.grad is not None and parameter.numel()
    ]
    _require_dense(with_gradient)
    finite = all_finite([each.parameter.grad for each in with_gradient])
    for each, usable in zip(with_gradient, finite, strict=True):
        if not usable:
            _skip(each.name, log)
    return [each for each, usable in zip(with_gradient, finite, strict=True) if usable]


def _require_dense(found: Iterable[ActiveParameter]) -> None:
    """Raise if gradients are sparse."""
    sparse = [each.name for each in found if each.parameter.grad.layout != torch.strided]
    if sparse:
        raise InvalidParameterError(f"gradients of {', '.join(sparse)} are sparse; make their layers with sparse=False")


def _skip(name: str, log: StepLog) -> None:
    """Count a parameter left alone because its gradient is not finite, with a warning at its first time."""
    log.skipped[name] += 1
    if log.skipped[name] == 1:
        _warn_caller(f"the gradient of {name!r} is not finite; the parameter is left as it is", UserWarning)


def all_finite(gradients: Sequence[Tensor]) -> list[bool]:
    """Return whether each gradient is finite, with one transfer to the host.

    Example:
        >>> all_finite([torch.ones(2), torch.tensor([1.0, float("nan")]), torch.tensor([float("inf")])])
        [True, False, False]
    """
    if not gradients:
        return []
    norms = torch._foreach_norm(gradients, float("inf"))
    return [math.isfinite(norm) for norm in torch.stack([norm.to(norms[0].device) for norm in norms]).tolist()]


def served_roles(capture: GradientCapture | None, verdicts: Mapping[str, Verification]) -> dict[int, tuple[str, str]]:
    """Return the layer and role of each parameter, by identity, whose factors are there and right.

    Example:
        >>> served_roles(None, {})
        {}
    """
    if capture is None or not verdicts:
        return {}
    found = _roles(capture)
    return {key: place for key, place in found.items() if place[0] in verdicts and verdicts[place[0]].explained}


def _roles(capture: GradientCapture) -> dict[int, tuple[str, str]]:
    """Return the layer and role of each parameter, by identity, whose factors the learned term can read."""
    roles: dict[int, tuple[str, str]] = {}
    modules = capture.layers
    for name, parameters in capture.served_parameters().items():
        adapter = require_adapter(modules[name], name)
        # the product layer writes weights as (o, i): an adapter for another order in memory keeps the nominal term
        if type(adapter).gradient_matrix is AbstractLayerAdapter.gradient_matrix:
            known = dict(zip(adapter.parameter_names, ("weight", "bias"), strict=False))
            roles.update({id(p): (name, known[role]) for role, p in parameters.items() if role in known})
    return roles


def _warn_caller(message: str, category: type[Warning]) -> None:
    """Warn at the line that called ``step``, below the wrappers that torch and its schedulers put around it."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and _is_internal(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _is_internal(module: str) -> bool:
    """Whether a module is part of this package or of torch."""
    return module.partition(".")[0] in ("gmn_optim", "torch")


# ---------------------------------------------------------------------- as told to the user


class Routing:
    """Who serves which parameter at a moment, and why.

    Args:
        model: The module that is trained.
        config: Of the rule.
        capture: Gives the factors, or None where the rule looks at none.
        reasons: Layer name to why its factors did not explain its gradient at the newest step; empty where they did.

    Example:
        >>> model, config = nn.Linear(2, 1), RuleConfig(nominal="adam", body=None)
        >>> Routing(model, config, None, {}).of(model.bias)
        (False, 'the rule has no learned term')
    """

    def __init__(
        self, model: nn.Module, config: RuleConfig, capture: GradientCapture | None, reasons: Mapping[str, str]
    ) -> None:
        self._model, self._config, self._reasons = model, config, reasons
        self._kinds = _layer_kinds(model)
        self._is_open = capture is not None and not capture.closed
        self._layers = {} if capture is None else {key: name for key, (name, _) in _roles(capture).items()}
        self._adapted = {id(p) for module in model.modules() if find_adapter(module) for p in module.parameters(False)}

    def of(self, parameter: Tensor) -> tuple[bool, str]:
        """Return whether the learned term serves a parameter, and why or why not."""
        if self._config.body is None:
            return False, "the rule has no learned term"
        if self._config.gradmetanet is None:
            return True, "the rule needs no factors"
        if not parameter.requires_grad:
            return False, "frozen"
        if not self._is_open:
            return False, "the optimizer is closed"
        return self._of_layer(parameter)

    def _of_layer(self, parameter: Tensor) -> tuple[bool, str]:
        """Return whether the factors of a parameter's layer serve it, and why or why not."""
        kind, layer = self._kinds.get(id(parameter)), self._layers.get(id(parameter))
        if layer is None and id(parameter) in self._adapted:
            return False, "its layer's weight is shared, parametrized or stored otherwise"
        if layer is None:
            return False, f"no adapter serves {kind}" if kind else "not a parameter of the model"
        if layer not in self._reasons:
            return True, "its layer is hooked; no step yet"
        return not self._reasons[layer], self._reasons[layer] or "its factors explain its gradient"

    def summary(self, groups: Groups) -> Summary:
        """Return a row for each parameter in the groups."""
        names = name_parameters(self._model, groups)
        return Summary(tuple(self._row(parameter, names[id(parameter)]) for parameter in _parameters(groups)))

    def _row(self, parameter: Tensor, name: str) -> SummaryRow:
        """Return one parameter's row."""
        learned, reason = self.of(parameter)
        kind = self._kinds.get(id(parameter), "(outside the model)")
        who = self._config.arm if learned else self._config.nominal
        return SummaryRow(name, tuple(parameter.shape), kind, who, reason)

    def served_share(self, groups: Groups) -> float:
        """Return the share of the elements in the groups that the learned term serves."""
        served = sum(parameter.numel() for parameter in _parameters(groups) if self.of(parameter)[0])
        return served / max(sum(parameter.numel() for parameter in _parameters(groups)), 1)


def _parameters(groups: Groups) -> Iterator[Tensor]:
    """Yield all parameters of the groups."""
    return (parameter for group in groups for parameter in group["params"])


def _layer_kinds(model: nn.Module) -> dict[int, str]:
    """Return the class name of the module that owns each parameter."""
    return {
        id(parameter): type(module).__name__
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    }
