"""What happens when a hook reports: layer calls are paired with their gradients and become records."""

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gmn_optim.capture.diagnosis import Observations
from gmn_optim.capture.flow import FlowTracker
from gmn_optim.capture.layers import ServedLayer
from gmn_optim.capture.records import Record, RecordStore, thin_factors
from gmn_optim.capture.verification import Precision, Probes, precision_of
from gmn_optim.capture.watching import NO_BACKWARD, CallTally, LayerUse, current_backward, hooked_tensor
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
        flow: What the forward passes prove about the wiring.
        observations: What is noted besides.
        probes: The probe vectors.

    Example:
        >>> recorder = Recorder(rows=None, seed=0)
        >>> recorder.begin_forward((torch.ones(1),), {})
        >>> recorder.end_forward(torch.ones(1))
        >>> recorder.flow.flows()
        {}
    """

    def __init__(self, rows: int | None, seed: int) -> None:
        self.enabled, self.is_open = True, False
        self.store, self.flow = RecordStore(), FlowTracker()
        self.observations, self.probes = Observations(), Probes(seed)
        self._rows = rows
        self._forward, self._depth, self._calls = 0, 0, 0
        self._tallies: dict[int, CallTally] = {}
        self._outer: dict[int, int] = {}

    def close(self) -> None:
        """Take no more reports; what was kept stays."""
        self.is_open = False
        self._depth = 0

    def clear(self) -> None:
        """Drop what was kept."""
        self._depth = 0  # an interrupted forward pass (KeyboardInterrupt) never calls the exit hook
        self.store.clear()
        self.observations.clear()
        self.flow.clear()

    def begin_forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note that a root forward pass starts."""
        if self._depth == 0 and current_backward() == NO_BACKWARD:
            self._start_forward()
            if self.enabled and torch.is_grad_enabled():
                self.flow.begin(args, kwargs)
        self._depth += 1

    def end_forward(self, output: Any) -> None:
        """Note that a root forward pass ended; ``output`` is None when it failed."""
        self._depth = max(0, self._depth - 1)
        if self._depth == 0 and current_backward() == NO_BACKWARD:
            self.flow.finish(output)

    def see_call(
        self, layer: ServedLayer, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """Put a tensor hook on what a layer returned, if a gradient may come to one of its parameters."""
        parameters = layer.parameters()
        weight = layer.weight_among(parameters)
        if weight is None:
            return
        self.observations.called.add(id(weight))
        is_watched = torch.is_grad_enabled() and isinstance(output, Tensor) and output.requires_grad
        if is_watched and any(parameter.requires_grad for parameter in parameters.values()):
            self._watch(layer, weight, layer.adapter.select_input(module, args, kwargs), output)

    def see_gradient(self, use: LayerUse, module: nn.Module, weight: nn.Parameter, gradient: Tensor) -> None:
        """Pair the gradient of a layer's output with what the layer read."""
        if not self.is_open:
            return
        self._outer[current_backward()] = use.backward
        trainable = next((served for served in use.layer.parameters().values() if served.requires_grad), weight)
        if trainable.grad is None:
            # Set to None since, or never filled: nothing of an earlier pass is in it.
            self.store.keep_pass(weight, use.backward)
        if use.is_differentiable:
            self.observations.differentiated_twice.add(id(weight))
        factors, precision = _pair(use, module, gradient, trainable.dtype)
        sums = self.probes.sums(factors, precision)
        kept = thin_factors(factors, self._share_of_rows(use.tally))
        onto = trainable.grad is not None
        self.store.add(Record(weakref.ref(weight), use.forward, use.call, use.backward, kept, sums, onto))

    def _watch(self, layer: ServedLayer, weight: nn.Parameter, layer_input: Tensor, output: Tensor) -> None:
        """Hook one call and note where its input came from."""
        backward = current_backward()
        is_recomputed = backward != NO_BACKWARD
        if self._depth == 0 and not is_recomputed:
            self._start_forward()
        elif not is_recomputed:
            self.flow.see(layer.name, id(weight), layer_input, output)
        self._calls += 1
        tally = self._tallies.setdefault(id(weight), CallTally())
        # A checkpointed block calls its layers twice, and uses them once.
        tally.uses += not is_recomputed
        # Autograd guards the input only if it saved it, which it does not for a frozen weight.
        kept = layer_input.detach() if weight.requires_grad else layer_input.detach().clone()
        made_in = self._outer.get(backward, backward)
        use = LayerUse(self, layer, weight, kept, output.shape, self._forward, self._calls, tally, made_in)
        hooked_tensor(output).register_hook(use)

    def _start_forward(self) -> None:
        """Count a forward pass."""
        self._forward += 1
        self._tallies = {}
        self._outer = {}

    def _share_of_rows(self, tally: CallTally) -> int | None:
        """Return the most rows to keep of one use."""
        return None if self._rows is None else max(1, self._rows // max(1, tally.uses))


def _pair(
    use: LayerUse, module: nn.Module, gradient: Tensor, dtype: torch.dtype
) -> tuple[DecomposedGradient, Precision]:
    """Return the factors of one call in one dtype, and how exact the arithmetic was."""
    activations = use.layer.adapter.activations(module, use.layer_input)
    backprops = use.layer.adapter.backprops(module, gradient)
    if activations.shape[:2] != backprops.shape[:2]:
        raise CaptureError(
            f"layer {use.layer.name!r}: activations {tuple(activations.shape)} and backprops "
            f"{tuple(backprops.shape)} must agree in (b, p)"
        )
    precision = precision_of(activations.dtype, backprops.dtype, dtype)
    if activations.dtype != backprops.dtype:
        # Autocast computes in low precision what entered in high precision.
        wide = torch.promote_types(activations.dtype, backprops.dtype)
        activations, backprops = activations.to(wide), backprops.to(wide)
    return DecomposedGradient(activations, backprops), precision
