"""Who updates which parameter, as told to the user: summary, reasons, and the share that the learned term serves."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from gmn_optim.basis_sources import basis_sources
from gmn_optim.capture import GradientCapture, Verification
from gmn_optim.capture.adapters import find_adapter
from gmn_optim.places import (
    NOWHERE,
    Groups,
    find_places,
    known_places,
    name_parameters,
    parameters_in,
    spaces_of,
    vanishing_parameters,
)
from gmn_optim.report import Summary, SummaryRow, describe_spaces
from gmn_optim.rule import RuleConfig, Segment
from gmn_optim.rule.matrices import find_matrices
from gmn_optim.rule.nominal import nominal_terms
from gmn_optim.rule.small_weights import LEAST_SIZE, are_small, first_sizes

SMALL = "a weight is smaller than those of meta-training were at first"
MATRICES_ALONE = "the learned term serves matrices alone, each with its bias"


class Routing:
    """Who serves which parameter at a moment, and why.

    Args:
        model: The module that is trained.
        config: Of the rule.
        capture: Gives the factors, or None where the rule looks at none.
        verdicts: Of the newest step on each layer.
        sizes: Root mean square before the first step of each weight that is a matrix, as far as known, by identity.

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
        sizes: Mapping[int, Tensor] = MappingProxyType({}),
    ) -> None:
        self._sizes = sizes
        self._model, self._config, self._verdicts = model, config, verdicts
        self._vanishing = set() if capture is None else vanishing_parameters(capture, verdicts)
        self._capture = capture
        self._kinds = _layer_kinds(model)
        self._is_open = capture is not None and not capture.closed
        self._layers = {} if capture is None else {key: place.layer for key, place in known_places(capture).items()}
        self._adapted = _adapted_parameters(model)

    def of(self, parameter: Tensor) -> tuple[bool, str]:
        """Return whether the learned term serves a parameter, and why or why not."""
        if self._config.body is None:
            return False, "the rule has no learned term"
        if not self._config.needs_factors:
            return True, "the rule needs no factors"
        if not parameter.requires_grad:
            return False, "frozen"
        return self._of_layer(parameter)

    def of_each(self, groups: Groups) -> dict[int, tuple[bool, str]]:
        """Return for each trained parameter, by identity, what :meth:`of` says, given what stands beside it.

        A body in the eigenbasis serves a weight, with its bias where both take the same steps, and nothing else.
        """
        found = {id(parameter): self.of(parameter) for parameter in parameters_in(groups)}
        if not self._config.in_eigenbasis:
            return found
        sizes = self._first_sizes(groups)
        if bool(((sizes >= LEAST_SIZE) & (sizes < self._config.least_size)).any()):
            return {key: (False, SMALL if served else reason) for key, (served, reason) in found.items()}
        weights = self._weights(groups)
        return {
            key: found[weights[key]] if key in weights else (False, MATRICES_ALONE if served else reason)
            for key, (served, reason) in found.items()
        }

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
        names, bases, verdicts = name_parameters(self._model, groups), self._bases(groups), self.of_each(groups)
        rows = tuple(
            self._row(parameter, names[id(parameter)], verdicts[id(parameter)], bases)
            for parameter in parameters_in(groups)
        )
        found = None if self._capture is None or not spaces else spaces_of(self._capture, set(self._layers.values()))
        return Summary(rows, describe_spaces(found) if found is not None else ())

    def _row(self, parameter: Tensor, name: str, verdict: tuple[bool, str], bases: Mapping[str, str]) -> SummaryRow:
        """Return one parameter's row."""
        learned, reason = verdict
        kind = self._kinds.get(id(parameter), "(outside the model)")
        who = self._config.arm if learned else self._config.nominal
        if name in bases:
            reason = bases[name] if self._config.body is None else f"{reason}; {bases[name]}"
        return SummaryRow(name, tuple(parameter.shape), kind, who, reason)

    def _bases(self, groups: Groups) -> dict[str, str]:
        """Return by name what the basis of each trained parameter is made from, if the nominal term has bases."""
        term = nominal_terms[self._config.nominal]
        if not term.uses_factors:
            return {}
        names = name_parameters(self._model, groups)
        parameters = {names[id(p)]: p for p in parameters_in(groups) if p.requires_grad}
        turns = not (term.minds_small_weights and bool(are_small(self._first_sizes(groups))))
        return basis_sources(self._segments(groups, names), lambda name: self._of_layer(parameters[name]), turns)

    def _first_sizes(self, groups: Groups) -> Tensor:
        """Return the relative sizes of the matrices that have taken a step (n)."""
        names = name_parameters(self._model, groups)
        sizes = {name: self._sizes[key] for key, name in names.items() if key in self._sizes}
        known = [matrix for matrix in find_matrices(self._segments(groups, names)) if matrix.weight.name in sizes]
        return first_sizes(known, [sizes[matrix.weight.name] for matrix in known]) if known else torch.zeros(0)

    def _weights(self, groups: Groups) -> dict[int, int]:
        """Return, for each weight that is no table and for its bias, the identity of the weight."""
        names = name_parameters(self._model, groups)
        keys, clocks = {name: key for key, name in names.items()}, self._segments(groups, names)
        weights = {}
        for matrix in find_matrices(clocks):
            if matrix.weight.role == "weight" and matrix.has_basis:
                owned = [clocks[part.chunk][1][part.segment].name for part in matrix.parts]
                weights.update({keys[name]: keys[matrix.weight.name] for name in owned})
        return weights

    def _segments(self, groups: Groups, names: Mapping[int, str]) -> list[tuple[int, list[Segment]]]:
        """Return the trained parameters, those together that take the same steps."""
        places = find_places(self._capture, self._verdicts)
        clocks: dict[int, list[Segment]] = {}
        for number, group in enumerate(groups):
            of_group = clocks.setdefault(-1 if group["momentum"] is None else number, [])
            for parameter in group["params"]:
                if parameter.requires_grad:
                    place = places.get(id(parameter), NOWHERE)
                    of_group.append(Segment(names[id(parameter)], tuple(parameter.shape), *place[:4]))
        return [*clocks.items()]

    def served_share(self, groups: Groups) -> float:
        """Return the share of the elements in the groups that the learned term serves."""
        verdicts = self.of_each(groups)
        served = sum(parameter.numel() for parameter in parameters_in(groups) if verdicts[id(parameter)][0])
        return served / max(sum(parameter.numel() for parameter in parameters_in(groups)), 1)


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
