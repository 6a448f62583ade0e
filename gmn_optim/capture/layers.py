"""Which modules of a model are served by an adapter, and which of them share a weight.

Modules are held weakly throughout, so that nothing here keeps a model alive.
"""

import weakref
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import NamedTuple

from torch import nn

from gmn_optim.capture.adapters import AbstractLayerAdapter, find_adapter, require_adapter
from gmn_optim.errors import InvalidArgumentError, UnsupportedLayerError


class ServedLayer:
    """One module, the adapter that serves it, and its name in the model.

    Args:
        name: The module's name in ``model.named_modules()``.
        module: The module; held weakly.
        adapter: What knows the module's kind.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 2))
        >>> layer = find_layers(model)[0]
        >>> layer.name, sorted(layer.parameters())
        ('0', ['bias', 'weight'])
    """

    def __init__(self, name: str, module: nn.Module, adapter: AbstractLayerAdapter) -> None:
        self.name = name
        self.adapter = adapter
        self._module = weakref.ref(module)

    @property
    def module(self) -> nn.Module | None:
        """The module, or None when it is gone."""
        return self._module()

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the served parameters that the module has now, the weight first."""
        module = self.module
        owned: Mapping[str, nn.Parameter | None] = {} if module is None else module._parameters
        # Under torch.func.functional_call these slots hold plain tensors, whose gradients go elsewhere.
        return {name: owned[name] for name in self.adapter.parameter_names if isinstance(owned.get(name), nn.Parameter)}

    def weight(self) -> nn.Parameter | None:
        """Return the parameter by which uses of this layer are told apart, or None when it is not plain."""
        return self.weight_among(self.parameters())

    def weight_among(self, parameters: Mapping[str, nn.Parameter]) -> nn.Parameter | None:
        """Pick the weight from what :meth:`parameters` returned."""
        return parameters.get(self.adapter.parameter_names[0])


class LayerGroup(NamedTuple):
    """All layers with one weight, reported under the name of the first.

    Attributes:
        name: Name of the owner.
        weight: The shared parameter.
        members: The layers, the owner first, else in the order of ``model.named_modules()``.
        parameters: Parameters whose whole gradient the group's factors give. A bias that belongs to only some of the
            members, or also to another group, is missing here: the sum over all uses is not its gradient.
        adds_up: Whether all members read the weight in one order, so that what they give can be added.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> model[1].weight = model[0].weight
        >>> group = group_layers(find_layers(model))["0"]
        >>> len(group.members), sorted(group.parameters)
        (2, ['weight'])
    """

    name: str
    weight: nn.Parameter
    members: tuple[ServedLayer, ...]
    parameters: dict[str, nn.Parameter]
    adds_up: bool

    @property
    def owner(self) -> ServedLayer:
        """The layer whose factors the learned term reads: the first whose gradient is a sum of outer products."""
        return self.members[0]

    def kinds(self) -> dict[str, tuple[ServedLayer, ...]]:
        """Return the members of each kind, whose factors can be put together, under the name of the first."""
        kinds: dict[type[AbstractLayerAdapter], list[ServedLayer]] = {}
        for member in self.members:
            kinds.setdefault(type(member.adapter), []).append(member)
        return {members[0].name: tuple(members) for members in kinds.values()}


def find_layers(model: nn.Module, names: Iterable[str] | None = None) -> list[ServedLayer]:
    """Return the modules of ``model`` that can be captured, in the order of ``model.named_modules()``.

    A module is left out when no adapter serves it or when its weight is not a plain parameter (parametrized,
    weight-normed, pruned): its hook would see a gradient that is not the parameter's.

    Args:
        model: Any module.
        names: Only these modules; None for all.

    Raises:
        InvalidArgumentError: a name is not a module of ``model``.
        UnsupportedLayerError: a named module cannot be captured.

    Example:
        >>> from torch import nn
        >>> [layer.name for layer in find_layers(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1)))]
        ['0', '2']
    """
    modules = dict(model.named_modules())
    wanted = modules if names is None else {name: _module_called(name, modules) for name in names}
    layers = [
        ServedLayer(name, module, adapter)
        for name, module in modules.items()
        if name in wanted and (adapter := find_adapter(module)) is not None
    ]
    served = [layer for layer in layers if _is_plain(layer.weight())]
    if names is not None:
        _require_all(wanted, served)
    return served


def group_layers(layers: Iterable[ServedLayer]) -> dict[str, LayerGroup]:
    """Return group name to the layers that share one weight; layers whose module is gone are left out.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
        >>> list(group_layers(find_layers(model)))
        ['0', '1']
    """
    by_weight: dict[int, list[ServedLayer]] = {}
    for layer in layers:
        weight = layer.weight()
        if weight is not None:
            by_weight.setdefault(id(weight), []).append(layer)
    roles = _roles(by_weight)
    groups = [_group(sorted(members, key=_is_no_matrix), roles) for members in by_weight.values()]
    return {group.name: group for group in groups}


def _group(members: list[ServedLayer], roles: Mapping[int, int]) -> LayerGroup:
    """Describe the layers of one weight; ``roles`` counts in how many groups and slots a parameter appears."""
    first = members[0].parameters()
    common = {
        name: parameter
        for name, parameter in first.items()
        if roles[id(parameter)] == 1 and all(member.parameters().get(name) is parameter for member in members)
    }
    return LayerGroup(members[0].name, members[0].weight_among(first), tuple(members), common, _adds_up(members))


def _is_no_matrix(layer: ServedLayer) -> bool:
    """Whether the gradient of a layer's weight is no sum of outer products."""
    return layer.adapter.structure != "matrix"


def _adds_up(members: list[ServedLayer]) -> bool:
    """Whether layers with one weight are of one kind, or all read it as it lies in memory."""
    if len({type(member.adapter) for member in members}) == 1:
        return True
    modules = [(member.adapter, member.module) for member in members if member.module is not None]
    return all(
        adapter.structure != "diagonal" and adapter.weight_order(module) is None and adapter.groups(module) == 1
        for adapter, module in modules
    )


def _roles(by_weight: Mapping[int, list[ServedLayer]]) -> dict[int, int]:
    """Count for each parameter the different (weight, slot) places in which it appears."""
    places: dict[int, set[tuple[int, str]]] = {}
    for key, members in by_weight.items():
        for member in members:
            for name, parameter in member.parameters().items():
                places.setdefault(id(parameter), set()).add((key, name))
    return {parameter: len(found) for parameter, found in places.items()}


def _is_plain(weight: nn.Parameter | None) -> bool:
    """Whether the weight is an ordinary real parameter."""
    return weight is not None and weight.dtype.is_floating_point


def _module_called(name: str, modules: Mapping[str, nn.Module]) -> nn.Module:
    """Look up one module by name."""
    if not isinstance(name, str) or name not in modules:
        near = get_close_matches(str(name), list(modules), n=3)
        hint = f"did you mean {', '.join(map(repr, near))}?" if near else "see model.named_modules()."
        raise InvalidArgumentError(f"layers contains {name!r}, which is no module of the model; {hint}")
    return modules[name]


def _require_all(wanted: Mapping[str, nn.Module], served: list[ServedLayer]) -> None:
    """Refuse named modules that cannot be captured."""
    for name in wanted.keys() - {layer.name for layer in served}:
        require_adapter(wanted[name], name)
        raise UnsupportedLayerError(
            f"the weight of layer {name!r} is not a plain real parameter (parametrized, weight-normed or pruned); "
            "leave it out of layers, or remove the parametrization first."
        )
