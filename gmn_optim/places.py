"""Where the parameters of a model stand: their names, their captured layers, and the neuron spaces of these."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from gmn_optim.capture import AbstractLayerAdapter, GradientCapture, Verification
from gmn_optim.capture.adapters import require_adapter
from gmn_optim.neurons import NeuronSpaces
from gmn_optim.streams import infer_spaces
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
        missed: Whether they are there and do not.
    """

    layer: str | None
    role: str
    order: WeightOrder | None = None
    groups: int = 1
    explained: bool = False
    missed: bool = False


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
        >>> import torch
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


def parameters_in(groups: Groups) -> Iterator[Tensor]:
    """Yield all parameters of the groups."""
    return (parameter for group in groups for parameter in group["params"])


def find_places(capture: GradientCapture | None, verdicts: Mapping[str, Verification]) -> dict[int, Place]:
    """Return the place of each parameter of a captured layer, by identity.

    Example:
        >>> find_places(None, {})
        {}
    """
    if capture is None:
        return {}
    explained, missed = ({n for n, v in verdicts.items() if v.explained is wanted} for wanted in (True, False))
    # scale-free features would blow rounding error up to the size of a gradient
    noise = vanishing_parameters(capture, verdicts)
    return {
        key: place._replace(explained=place.layer in explained and key not in noise, missed=place.layer in missed)
        for key, place in known_places(capture).items()
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


def vanishing_parameters(capture: GradientCapture, verdicts: Mapping[str, Verification]) -> set[int]:
    """Return the identities of parameters whose gradient is rounding error."""
    parameters = capture.served_parameters()
    return {id(parameters[layer][name]) for layer, v in verdicts.items() if layer in parameters for name in v.vanishing}


def known_places(capture: GradientCapture) -> dict[int, Place]:
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
