"""What happens when a hook reports: layer calls are paired with their gradients and become records."""

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gmn_optim.capture.adapters import AbstractLayerAdapter
from gmn_optim.capture.attention import AttentionAdapter
from gmn_optim.capture.diagnosis import Observations
from gmn_optim.capture.graph_rows import hook_rows
from gmn_optim.capture.layers import ServedLayer
from gmn_optim.capture.outside import CallPlace, FoundUse, OutsideUse, OutsideUses
from gmn_optim.capture.records import Record, RecordStore
from gmn_optim.capture.rows import EVERY_ROW, RowChoice, choose_rows, rank_data_points
from gmn_optim.capture.verification import CallGradient, Probes, precision_of
from gmn_optim.capture.watching import NO_BACKWARD, CallTally, LayerUse, current_backward, hooked_tensor
from gmn_optim.capture.wiring import WiringTracker
from gmn_optim.errors import CaptureError
from gmn_optim.gradients import DecomposedGradient


class Recorder:
    """Counts forward passes, tells backward passes apart, and keeps what they leave.

    Args:
        rows: The most rows to keep of a weight for each forward pass; None for all.
        seed: Of the probes.

    Attributes:
        enabled: Whether anything is noted.
        is_open: Whether its capture is attached; tensor hooks may outlive that.
        store: The records.
        wiring: What the forward passes prove of the layers' neurons.
        outside: Finds the uses of weights outside of their modules.
        observations: What is noted besides.
        probes: The probe vectors.

    Example:
        >>> recorder = Recorder(rows=None, seed=0)
        >>> recorder.begin_forward(nn.Identity(), (torch.ones(1),), {})
        >>> recorder.end_forward(torch.ones(1))
        >>> recorder.wiring.wiring()
        {}
    """

    def __init__(self, rows: int | None, seed: int) -> None:
        self.enabled, self.is_open = True, False
        self.store, self.wiring, self.outside = RecordStore(), WiringTracker(), OutsideUses()
        self.observations, self.probes = Observations(), Probes(seed)
        self._rows = rows
        self._forward, self._depth, self._calls = 0, 0, 0
        self._tallies: dict[int, CallTally] = {}
        self._outer: dict[int, int] = {}
        self._orders: dict[tuple[int, int], Tensor] = {}
        self._inputs: Any = None

    def close(self) -> None:
        """Take no more reports; what was kept stays."""
        self.is_open = False
        self._depth = 0
        self.wiring.abandon()

    def clear(self) -> None:
        """Drop what was kept."""
        # An interrupted forward pass (KeyboardInterrupt) never calls the exit hook.
        self._depth, self._inputs = 0, None
        self.store.clear()
        self._orders = {}
        self.wiring.abandon()

    def begin_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note that a forward pass of the model, or of a part of it, starts; parts called within are no new one."""
        if self._depth == 0 and current_backward() == NO_BACKWARD:
            self._start_forward()
            self._inputs = (args, kwargs)
            if self.enabled and torch.is_grad_enabled():
                self.wiring.begin(module, args, kwargs)
        self._depth += 1

    def end_forward(self, output: Any) -> None:
        """Note that such a forward pass ended; ``output`` is None when it failed."""
        self._depth = max(0, self._depth - 1)
        if self._depth == 0 and current_backward() == NO_BACKWARD:
            self.wiring.finish(output)
            inputs, self._inputs = self._inputs, None
            if output is not None and self.enabled and torch.is_grad_enabled():
                self._watch_outside(self.outside.find(output, inputs))

    def see_call(
        self, layer: ServedLayer, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """Put a tensor hook on what a layer returned, if a gradient may come to one of its parameters."""
        parameters = layer.parameters()
        weight = layer.weight_among(parameters)
        if weight is None:
            return
        self.observations.called.add(id(weight))
        if self._depth > 0 and torch.is_grad_enabled() and current_backward() == NO_BACKWARD:
            if isinstance(layer.adapter, AttentionAdapter):
                self.wiring.see_attention(layer, module, layer.adapter.select_inputs(args, kwargs), output)
            else:
                self.wiring.see(layer, module, layer.adapter.select_input(module, args, kwargs), output)
        is_watched = torch.is_grad_enabled() and isinstance(output, Tensor) and output.requires_grad
        if is_watched and any(parameter.requires_grad for parameter in parameters.values()):
            self._watch(layer, weight, layer.adapter.select_input(module, args, kwargs), output)
            self.outside.claim(output, (args, kwargs))
        elif torch.is_grad_enabled() and isinstance(layer.adapter, AttentionAdapter):
            self._start_outermost()
            query = layer.adapter.select_input(module, args, kwargs)
            self._watch_outside(self.outside.find_inside(module, query, output, (args, kwargs)))

    def see_gradient(self, use: LayerUse, module: nn.Module, weight: nn.Parameter, gradient: Tensor) -> None:
        """Pair the gradient of a layer's output with what the layer read."""
        if not self.is_open:
            return
        self._outer[current_backward()] = use.backward
        if use.is_differentiable:
            self.observations.differentiated_twice.add(id(weight))
        trainable = next((served for served in use.layer.parameters().values() if served.requires_grad), weight)
        if not _reaches_gradient(trainable):
            return
        if trainable.grad is None:
            # Set to None since, or never filled: nothing of an earlier pass is in it.
            self.store.keep_pass(weight, use.backward)
        adapter = use.layer.adapter
        call = _describe_call(use, weight, gradient, (trainable.dtype, adapter.arithmetic or trainable.dtype))
        sums = self.probes.sums(adapter, module, call)
        choice = self._choose_rows(use, adapter, module, call)
        kept = adapter.decompose(module, call.layer_input, call.output_gradient, choice)
        _require_pairs(use.layer.name, kept)
        onto = trainable.grad is not None
        place = weakref.ref(weight), adapter, use.forward, use.call, use.backward
        self.store.add(Record(*place, kept, sums, onto, choice.scale))

    def see_loss(self, weight: nn.Parameter) -> None:
        """Note that a use of a weight left no rows."""
        if self.is_open and self.enabled:
            self.observations.lost.add(id(weight))

    def _watch(self, layer: ServedLayer, weight: nn.Parameter, layer_input: Tensor, output: Tensor) -> None:
        """Hook one call."""
        self._start_outermost()
        # Autograd guards the input only if it saved it, which it does not for a frozen weight.
        kept = layer_input.detach() if weight.requires_grad else layer_input.detach().clone()
        use = LayerUse(self, layer, weight, kept, output.shape, *self._place_call(weight))
        hooked_tensor(output).register_hook(use)

    def _watch_outside(self, found: list[FoundUse]) -> None:
        """Hook uses of weights outside of their modules."""
        for each in found:
            hook_rows(each.use, OutsideUse(self, each, self._place_call(each.use.weight)))

    def _place_call(self, weight: nn.Parameter) -> CallPlace:
        """Count a use of a weight, and return where it stands."""
        backward = current_backward()
        self._calls += 1
        tally = self._tallies.setdefault(id(weight), CallTally())
        # A checkpointed block calls its layers twice, and uses them once.
        tally.uses += backward == NO_BACKWARD
        return CallPlace(self._forward, self._calls, tally, self._outer.get(backward, backward))

    def _start_outermost(self) -> bool:
        """Count a forward pass if a layer is called by itself; return whether it is."""
        is_outermost = self._depth == 0 and current_backward() == NO_BACKWARD
        if is_outermost:
            self._start_forward()
        return is_outermost

    def _start_forward(self) -> None:
        """Count a forward pass."""
        self._forward += 1
        self._tallies = {}
        self._outer = {}
        self._orders = {}

    def _choose_rows(
        self, use: LayerUse, adapter: AbstractLayerAdapter, module: nn.Module, call: CallGradient
    ) -> RowChoice:
        """Return the rows to keep: of the same data points in all layers that a backward pass reaches."""
        data_points, positions = adapter.rows_of(module, call.layer_input, call.output_gradient)
        rows = None if self._rows is None else max(1, self._rows // max(1, use.tally.uses))
        if rows is None or data_points * positions <= rows:
            return EVERY_ROW
        key = (use.backward, data_points)
        if key not in self._orders:
            # ranked by norm, so that the order in which the batch lists its data points is immaterial
            backprops = adapter.backprops(module, call.output_gradient)
            self._orders[key] = rank_data_points(backprops, call.layer_input)
        return choose_rows(data_points, positions, rows, self._orders[key])


def _reaches_gradient(parameter: nn.Parameter) -> bool:
    """Whether the backward pass under way will add to ``.grad``: ``autograd.grad(loss, inputs)`` does not."""
    try:
        return torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(parameter).node)
    except RuntimeError:  # a leaf whose gradient autograd.grad asked for, or that needs none
        return False


def _describe_call(
    use: LayerUse, weight: nn.Parameter, gradient: Tensor, dtypes: tuple[torch.dtype, ...]
) -> CallGradient:
    """Return input and output gradient of one call in one dtype, and how exact arithmetic in ``dtypes`` too was."""
    layer_input = use.layer_input
    if not layer_input.is_floating_point():
        return CallGradient(weight, layer_input, gradient, precision_of(gradient.dtype, *dtypes))
    precision = precision_of(layer_input.dtype, gradient.dtype, *dtypes)
    # Autocast computes in low precision what entered in high precision.
    wide = torch.promote_types(layer_input.dtype, gradient.dtype)
    return CallGradient(weight, layer_input.to(wide), gradient.to(wide), precision)


def _require_pairs(name: str, kept: DecomposedGradient) -> None:
    """Raise if an adapter's factors do not pair up."""
    if kept.activations.shape[:2] != kept.backprops.shape[:2]:
        raise CaptureError(
            f"layer {name!r}: activations {tuple(kept.activations.shape)} and backprops "
            f"{tuple(kept.backprops.shape)} must agree in (b, p)"
        )
