"""The front end for ``torch.func``: factors from zero probes added to the layers' outputs.

Tensor hooks fire inside ``vmap(grad(...))`` with tensors that must not leave it. The gradient with respect to a zero
that is added to a layer's output is the same backprop signal, and leaves as an ordinary result.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gmn_optim.capture.adapters import AbstractLayerAdapter
from gmn_optim.capture.attention import AttentionAdapter
from gmn_optim.capture.layers import LayerGroup, find_layers, group_layers
from gmn_optim.errors import CaptureError
from gmn_optim.gradients import DecomposedGradient, GradientSet, Recomposition


class LayerCall(NamedTuple):
    """One call of a layer in a forward pass.

    Attributes:
        layer: Name of the layer.
        shape: Shape of its output.
        owner: Name under which its factors are reported, the first layer of its kind with the same weight; None if the
            weight is shared with a layer that reads it in another order.
        parameters: Names of the parameters whose whole gradient the owner's factors give.
    """

    layer: str
    shape: torch.Size
    owner: str | None
    parameters: tuple[str, ...]


class CapturePlan(NamedTuple):
    """Which layers are called, in order, how large their outputs are (the shapes of the probes), and who reports them.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> plan_capture(model, lambda: model(torch.ones(5, 3))).layers
        ('0', '2')
    """

    calls: tuple[LayerCall, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """Return each called layer once, in order of the first call."""
        return tuple(dict.fromkeys(call.layer for call in self.calls))


class CapturedGradients(NamedTuple):
    """Results of :func:`capture_gradients`.

    Attributes:
        loss: Value of the loss ().
        gradients: Like the parameters that were given.
        factors: The decomposed gradients of every layer, by layer name.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> captured = capture_gradients(model, lambda w: (w * torch.ones(3)).sum(), torch.ones(3))
        >>> captured.loss.item(), captured.gradients.tolist()
        (3.0, [1.0, 1.0, 1.0])
    """

    loss: Tensor
    gradients: Any
    factors: GradientSet


def plan_capture(model: nn.Module, forward: Callable[[], object]) -> CapturePlan:
    """Return the plan for a forward pass that ``forward`` runs once, without gradients.

    Weights that are tied or reused are found here, as they are now; plan anew after tying others.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> [tuple(call.shape) for call in plan_capture(model, lambda: model(torch.ones(5, 3))).calls]
        [(5, 2)]
    """
    calls: list[LayerCall] = []
    groups = {member.name: group for group in group_layers(find_layers(model)).values() for member in group.members}

    def note(
        name: str, module: nn.Module, adapter: AbstractLayerAdapter, layer_input: Tensor, output: Tensor
    ) -> Tensor:
        calls.append(_describe_call(name, output.shape, groups[name]))
        return output

    with torch.no_grad(), _intercepted(_find_served(model), note):
        forward()
    return CapturePlan(tuple(calls))


def _describe_call(name: str, shape: torch.Size, group: LayerGroup) -> LayerCall:
    """Return one call of a layer, whose weight is the group's."""
    kinds = {member.name: owner for owner, members in group.kinds().items() for member in members}
    return LayerCall(name, shape, kinds[name] if group.adds_up else None, tuple(group.parameters))


def capture_gradients(
    model: nn.Module, loss: Callable[[Any], Tensor], parameters: Any, plan: CapturePlan | None = None
) -> CapturedGradients:
    """Return loss, gradients and decomposed gradients; maps under ``torch.func.vmap``.

    Args:
        model: The module whose layers are looked at. ``loss`` must call it, for example by
            ``torch.func.functional_call``.
        loss: A pure function from parameters to a scalar.
        parameters: What ``loss`` takes: a tensor, or a dict, tuple or list of tensors.
        plan: From :func:`plan_capture`; without it the forward pass runs once more to find the shapes.

    Raises:
        CaptureError: the forward pass called other layers than the plan says.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> x = torch.randn(5, 3)
        >>> def loss(parameters):
        ...     return torch.func.functional_call(model, parameters, x).square().mean()
        >>> captured = capture_gradients(model, loss, dict(model.named_parameters()))
        >>> bool(torch.allclose(captured.factors.mean_gradient("")["weight"], captured.gradients["weight"]))
        True
    """
    plan = plan or plan_capture(model, lambda: loss(parameters))
    served = _find_served(model)
    like = next(iter(torch.utils._pytree.tree_leaves(parameters)))
    probes = tuple(torch.zeros(call.shape, dtype=like.dtype, device=like.device) for call in plan.calls)
    differentiate = torch.func.grad_and_value(_probed(served, loss, plan), argnums=(0, 1), has_aux=True)
    (gradients, signals), (value, inputs) = differentiate(parameters, probes)
    return CapturedGradients(value, gradients, _assemble(served, plan, inputs, signals))


_Served = dict[str, tuple[nn.Module, AbstractLayerAdapter]]


def _find_served(model: nn.Module) -> _Served:
    """Return layer name to module and adapter, for the layers that hooks on modules would capture."""
    layers = [layer for layer in find_layers(model) if not isinstance(layer.adapter, AttentionAdapter)]
    return {layer.name: (module, layer.adapter) for layer in layers if (module := layer.module) is not None}


def _probed(
    served: _Served, loss: Callable[[Any], Tensor], plan: CapturePlan
) -> Callable[[Any, tuple[Tensor, ...]], tuple[Tensor, tuple[Tensor, ...]]]:
    """Return the loss as a function of parameters and probes, with the layers' inputs beside it."""

    def probed(parameters: Any, probes: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        inputs: list[Tensor] = []

        def add_probe(
            name: str, module: nn.Module, adapter: AbstractLayerAdapter, layer_input: Tensor, output: Tensor
        ) -> Tensor:
            place = len(inputs)
            if place >= len(plan.calls) or plan.calls[place].layer != name:
                raise CaptureError(_unplanned(plan, place, name))
            inputs.append(layer_input)
            return output + probes[place]

        with _intercepted(served, add_probe):
            value = loss(parameters)
        if len(inputs) != len(plan.calls):
            raise CaptureError(_unplanned(plan, len(inputs), None))
        return value, tuple(inputs)

    return probed


def _unplanned(plan: CapturePlan, place: int, name: str | None) -> str:
    """Return the message for a call that is not the planned one."""
    expected = repr(plan.calls[place].layer) if place < len(plan.calls) else "no further call"
    found = "the end of the forward pass" if name is None else f"layer {name!r}"
    return f"call {place} of the forward pass is {found}, the plan expected {expected}; plan this forward pass anew"


def _assemble(
    served: _Served, plan: CapturePlan, inputs: tuple[Tensor, ...], signals: tuple[Tensor, ...]
) -> GradientSet:
    """Return the factors by layer; several calls of one weight by the same data points are positions."""
    parts: dict[str, list[DecomposedGradient]] = {}
    recompositions: dict[str, Recomposition] = {}
    for call, layer_input, signal in zip(plan.calls, inputs, signals, strict=True):
        module, adapter = served[call.layer]
        if call.owner is not None:
            parts.setdefault(call.owner, []).append(adapter.decompose(module, layer_input, signal))
            recompositions.setdefault(call.owner, _recomposition(adapter, module, call.parameters))
    return GradientSet({name: _joined(pieces) for name, pieces in parts.items()}, recompositions)


def _recomposition(adapter: AbstractLayerAdapter, module: nn.Module, parameters: tuple[str, ...]) -> Recomposition:
    """Return the adapter's way back for one module, to the parameters that the factors explain."""

    def recompose(gradient: DecomposedGradient) -> dict[str, Tensor]:
        recomposed = adapter.recompose(module, gradient)
        return {name: value for name, value in recomposed.items() if name in parameters}

    return recompose


def _joined(pieces: list[DecomposedGradient]) -> DecomposedGradient:
    """Return several calls as one gradient: along p, or along b where the numbers of data points differ."""
    if len(pieces) == 1:
        return pieces[0]
    if len({piece.backprops.shape[0] for piece in pieces}) == 1:
        return _concatenated(pieces, 1)
    if len({piece.backprops.shape[1] for piece in pieces}) > 1:
        pieces = [DecomposedGradient(*(factor.flatten(0, 1).unsqueeze(1) for factor in piece)) for piece in pieces]
    return _concatenated(pieces, 0)


def _concatenated(pieces: list[DecomposedGradient], axis: int) -> DecomposedGradient:
    """Return the pieces one behind the other."""
    return DecomposedGradient(*(torch.cat(factor, dim=axis) for factor in zip(*pieces, strict=True)))


_Intercept = Callable[[str, nn.Module, AbstractLayerAdapter, Tensor, Tensor], Tensor]


@contextmanager
def _intercepted(served: _Served, intercept: _Intercept) -> Iterator[None]:
    """Let ``intercept`` see, and replace, the output of every served layer while the context is open."""
    handles = []
    try:
        for name, (module, adapter) in served.items():
            handles.append(module.register_forward_hook(_hook(name, adapter, intercept), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(name: str, adapter: AbstractLayerAdapter, intercept: _Intercept) -> Callable[..., Tensor]:
    """Return the forward hook of one layer."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
        return intercept(name, module, adapter, adapter.select_input(module, args, kwargs), output)

    return hook
