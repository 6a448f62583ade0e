"""Who updates which parameter: the learned term where captured factors explain a gradient, else the nominal term."""

import math
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gmn_optim.basis_sources import basis_sources
from gmn_optim.capture import AbstractLayerAdapter, GradientCapture, Verification
from gmn_optim.capture.adapters import find_adapter, require_adapter
from gmn_optim.errors import CaptureWarning, InvalidParameterError
from gmn_optim.neurons import NeuronSpaces, infer_spaces
from gmn_optim.report import StepLog, Summary, SummaryRow, describe_spaces
from gmn_optim.rule import RuleConfig, Segment
from gmn_optim.rule.nominal import nominal_terms
from gmn_optim.weight_order import WeightOrder

Groups = Sequence[Mapping[str, Any]]


class Place(NamedTuple):
    """Where a parameter stands.

    Attributes:
        layer: Name of the captured layer that it belongs to, or None.
        role: What it is in that layer, see :data:`gmn_optim.rule.layout.ROLES`; ``other`` if there is none.
        order: How it lies in memory, if otherwise than outputs first.
        groups: Blocks that the layer's inputs and outputs fall into.
        explained: Whether the layer's factors are there and explain its gradient.
    """

    layer: str | None
    role: str
    order: WeightOrder | None = None
    groups: int = 1
    explained: bool = False


NOWHERE = Place(None, "other")
"""The place of a parameter of no captured layer."""


class ActiveParameter(NamedTuple):
    """A parameter that takes part in a step.

    Attributes:
        name: Its full name.
        parameter: The parameter.
        group: The group that it is in.
        group_number: The group's number.
        place: Where it stands in the model.
    """

    name: str
    parameter: Tensor
    group: Mapping[str, Any]
    group_number: int
    place: Place = NOWHERE


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
        >>> with GradientCapture(nn.Linear(2, 1)) as capture:
        ...     warn_of_misses({"": Verification(False, 0.0, 1.0, "its weight is shared")}, {""}, capture, [])
    """
    missed = {n: verdict.reason for n, verdict in verdicts.items() if not verdict.explained and n not in warned}
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
    names: Mapping[int, str], groups: Groups, places: Mapping[int, Place], log: StepLog
) -> list[ActiveParameter]:
    """Return the parameters with a usable gradient; count those whose gradient is not finite, and warn of them once.

    Args:
        names: Parameter identity to name.
        groups: The optimizer's groups.
        places: Parameter identity to its place in the model.
        log: Where the others are counted.

    Raises:
        InvalidParameterError: a gradient is sparse.

    Example:
        >>> weight = nn.Parameter(torch.ones(2))
        >>> weight.grad = torch.ones(2)
        >>> [each.place.role for each in find_active({id(weight): "w"}, [{"params": [weight]}], {}, StepLog())]
        ['other']
    """
    with_gradient = [
        ActiveParameter(names[id(parameter)], parameter, group, number, places.get(id(parameter), NOWHERE))
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


def find_places(capture: GradientCapture | None, verdicts: Mapping[str, Verification]) -> dict[int, Place]:
    """Return the place of each parameter of a captured layer, by identity.

    Example:
        >>> find_places(None, {})
        {}
    """
    if capture is None:
        return {}
    explained = {name for name, verdict in verdicts.items() if verdict.explained}
    # scale-free features would blow rounding error up to the size of a gradient
    noise = _vanishing(capture, verdicts)
    return {
        key: place._replace(explained=place.layer in explained and key not in noise)
        for key, place in _roles(capture).items()
    }


def _hides_order(adapter: AbstractLayerAdapter) -> bool:
    """Whether ``weight_order`` does not tell how a weight lies: the adapter has a gradient matrix of its own."""
    return adapter.structure == "matrix" and (type(adapter).gradient_matrix is not AbstractLayerAdapter.gradient_matrix)


def spaces_of(capture: GradientCapture, layers: Collection[str]) -> NeuronSpaces | None:
    """Return the neuron spaces of some captured layers, as far as they are known; None without layers.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> with GradientCapture(model) as capture:
        ...     spaces_of(capture, [""]).widths
        (2, 1)
    """
    specs = {n: require_adapter(module, n).spec(module) for n, module in capture.layers.items() if n in layers}
    return infer_spaces(specs, capture.wiring()) if specs else None


def _vanishing(capture: GradientCapture, verdicts: Mapping[str, Verification]) -> set[int]:
    """Return the identities of parameters whose gradient is rounding error."""
    parameters = capture.served_parameters()
    return {id(parameters[layer][name]) for layer, v in verdicts.items() if layer in parameters for name in v.vanishing}


def _roles(capture: GradientCapture) -> dict[int, Place]:
    """Return the place of each parameter, by identity, whose factors the learned term can read."""
    places: dict[int, Place] = {}
    modules = capture.layers
    for name, parameters in capture.served_parameters().items():
        adapter = require_adapter(modules[name], name)
        roles, order = adapter.roles(), adapter.weight_order(modules[name])
        if order is None and _hides_order(adapter):
            continue
        form = order, adapter.groups(modules[name])
        for slot, parameter in parameters.items():
            if slot in roles:
                places[id(parameter)] = Place(name, roles[slot], *(form if roles[slot] == "weight" else ()))
    return places


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
        verdicts: Of the newest step on each layer.

    Example:
        >>> model, config = nn.Linear(2, 1), RuleConfig(nominal="adam", body=None)
        >>> Routing(model, config, None, {}).of(model.bias)
        (False, 'the rule has no learned term')
    """

    def __init__(
        self,
        model: nn.Module,
        config: RuleConfig,
        capture: GradientCapture | None,
        verdicts: Mapping[str, Verification],
    ) -> None:
        self._model, self._config, self._verdicts = model, config, verdicts
        self._vanishing = set() if capture is None else _vanishing(capture, verdicts)
        self._capture = capture
        self._kinds = _layer_kinds(model)
        self._is_open = capture is not None and not capture.closed
        self._layers = {} if capture is None else {key: place.layer for key, place in _roles(capture).items()}
        self._adapted = _adapted_parameters(model)

    def of(self, parameter: Tensor) -> tuple[bool, str]:
        """Return whether the learned term serves a parameter, and why or why not."""
        if self._config.body is None:
            return False, "the rule has no learned term"
        if self._config.gradmetanet is None:
            return True, "the rule needs no factors"
        if not parameter.requires_grad:
            return False, "frozen"
        return self._of_layer(parameter)

    def _of_layer(self, parameter: Tensor) -> tuple[bool, str]:
        """Return whether the factors of a parameter's layer serve it, and why or why not."""
        if not self._is_open:
            return False, "the optimizer is closed"
        kind, layer = self._kinds.get(id(parameter)), self._layers.get(id(parameter))
        if layer is None and id(parameter) in self._adapted:
            is_explained = self._adapted[id(parameter)]
            shared = "its layer's weight is shared, parametrized or stored otherwise"
            return False, shared if is_explained else "the factors of its layer do not give its gradient"
        if layer is None:
            return False, f"no adapter serves {kind}" if kind else "not a parameter of the model"
        if layer not in self._verdicts:
            return True, "its layer is hooked; no step yet"
        if id(parameter) in self._vanishing:
            return False, "its gradient is zero up to rounding"
        verdict = self._verdicts[layer]
        return verdict.explained, "its factors explain its gradient" if verdict.explained else verdict.reason

    def summary(self, groups: Groups, spaces: bool = False) -> Summary:
        """Return a row for each parameter in the groups and, if asked for, for each neuron space known so far."""
        names, bases = name_parameters(self._model, groups), self._bases(groups)
        rows = tuple(self._row(parameter, names[id(parameter)], bases) for parameter in _parameters(groups))
        found = None if self._capture is None or not spaces else spaces_of(self._capture, set(self._layers.values()))
        return Summary(rows, describe_spaces(found) if found is not None else ())

    def _row(self, parameter: Tensor, name: str, bases: Mapping[str, str]) -> SummaryRow:
        """Return one parameter's row."""
        learned, reason = self.of(parameter)
        kind = self._kinds.get(id(parameter), "(outside the model)")
        who = self._config.arm if learned else self._config.nominal
        if name in bases:
            reason = bases[name] if self._config.body is None else f"{reason}; {bases[name]}"
        return SummaryRow(name, tuple(parameter.shape), kind, who, reason)

    def _bases(self, groups: Groups) -> dict[str, str]:
        """Return by name what the basis of each trained parameter is made from, if the nominal term has bases."""
        if not nominal_terms[self._config.nominal].uses_factors:
            return {}
        names, places = name_parameters(self._model, groups), find_places(self._capture, self._verdicts)
        parameters = {names[id(p)]: p for p in _parameters(groups) if p.requires_grad}
        clocks: dict[int, list[Segment]] = {}
        for number, group in enumerate(groups):
            of_group = clocks.setdefault(-1 if group["momentum"] is None else number, [])
            for parameter in group["params"]:
                if parameter.requires_grad:
                    place = places.get(id(parameter), NOWHERE)
                    of_group.append(Segment(names[id(parameter)], tuple(parameter.shape), *place[:-1]))
        return basis_sources([*clocks.items()], lambda name: self._of_layer(parameters[name]))

    def served_share(self, groups: Groups) -> float:
        """Return the share of the elements in the groups that the learned term serves."""
        served = sum(parameter.numel() for parameter in _parameters(groups) if self.of(parameter)[0])
        return served / max(sum(parameter.numel() for parameter in _parameters(groups)), 1)


def _parameters(groups: Groups) -> Iterator[Tensor]:
    """Yield all parameters of the groups."""
    return (parameter for group in groups for parameter in group["params"])


def _adapted_parameters(model: nn.Module) -> dict[int, bool]:
    """Return, for each parameter of a layer that has an adapter, whether the adapter's factors give its gradient."""
    adapted = ((module, adapter) for module in model.modules() if (adapter := find_adapter(module)) is not None)
    return {
        id(parameter): name in adapter.parameter_names
        for module, adapter in adapted
        for name, parameter in module.named_parameters(recurse=False)
    }


def _layer_kinds(model: nn.Module) -> dict[int, str]:
    """Return the class name of the module that owns each parameter."""
    return {
        id(parameter): type(module).__name__
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    }
