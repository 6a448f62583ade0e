"""Which layers share neurons, found from what really flows through a forward pass of the whole model.

During a traced pass every tensor operation hands on the names of neurons (:mod:`gmn_optim.capture.neuron_names`). A
layer's output starts names of its own; a layer's input shows which names arrived there. What is not proven this way is
not claimed. One pass of the model is traced, or of each part that is called by itself, and another one when a layer is
called of which nothing is known yet.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from gmn_optim.capture.layers import ServedLayer
from gmn_optim.capture.neuron_names import UNKNOWN, Names, SameNames
from gmn_optim.capture.traced_pass import TracedPass, tensors_in
from gmn_optim.neurons import LayerWiring

MOST_TRACED_PASSES = 16
"""A model whose layers keep changing is traced no more after so many passes."""


class _Known:
    """What is known of one layer's neurons."""

    def __init__(self) -> None:
        self.inputs: Tensor | None = None
        self.outputs: Tensor | None = None
        self.wholes: dict[int, Tensor] = {}
        self.reads_model_input = True
        self.is_model_output = False


class WiringTracker:
    """Watches root forward passes; keeps what they prove.

    Passes are merged: neurons that any pass proves to be the same are the same.

    Example:
        >>> WiringTracker().wiring()
        {}
    """

    def __init__(self) -> None:
        self._names = SameNames()
        self._known: dict[str, _Known] = {}
        self._wiring: dict[str, LayerWiring] = {}
        self._pass: TracedPass | None = None
        self._begun: int | None = None
        self._traced: set[int] = set()
        self._passes: Counter[int] = Counter()

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Start a forward pass of a module with these arguments; it is traced if one of this module is due."""
        self.abandon()
        self._begun = id(module)
        if self._begun not in self._traced and self._passes[self._begun] < MOST_TRACED_PASSES:
            self._passes[self._begun] += 1
            self._pass = TracedPass(self._names, (*tensors_in(args), *tensors_in(kwargs)))
            self._pass.__enter__()

    def see(self, layer: ServedLayer, module: nn.Module, layer_input: Tensor, output: Any) -> None:
        """Take note of one layer call.

        Args:
            layer: The layer.
            module: Its module.
            layer_input: What the weight multiplied.
            output: What the layer returned.
        """
        if self._pass is None:
            self._note_unknown(layer)
        elif isinstance(output, Tensor):
            with self._pass.paused():
                known = self._known.setdefault(layer.name, _Known())
                self._note_input(known, layer, module, layer_input)
                self._note_output(known, layer, module, output)

    def see_attention(
        self, layer: ServedLayer, module: nn.MultiheadAttention, inputs: Sequence[Tensor], output: Any
    ) -> None:
        """Take note of one call of attention, whose projections are no module calls.

        Its values are, head by head, what the out-projection reads. Queries, keys and values share the neurons of one
        input only if they are one tensor.

        Args:
            layer: The layer of the in-projection.
            module: Its module.
            inputs: Queries, keys and values.
            output: What the module returned, a pair.
        """
        if self._pass is None or not isinstance(output[0], Tensor):
            self._note_unknown(layer)
            return
        with self._pass.paused():
            width = module.embed_dim
            projections = self._known.setdefault(layer.name, _Known())
            out = self._known.setdefault(f"{layer.name}.out_proj".lstrip("."), _Known())
            if all(each is inputs[0] for each in inputs):
                self._note_input(projections, layer, module, inputs[0])
            projections.reads_model_input &= self._pass.is_model_input(inputs[0])
            if projections.outputs is None:
                projections.outputs, out.outputs = self._names.fresh(3 * width), self._names.fresh(width)
            out.inputs, out.reads_model_input = projections.outputs[2 * width :], False
            self._pass.assign(output[0], output[0].dim() - 1, out.outputs)

    def finish(self, output: Any) -> None:
        """End the root forward pass that returned ``output``; None when it failed."""
        traced = self._pass
        self.abandon()
        if traced is None or output is None:
            return
        self._traced.add(self._begun)
        returned = {name for tensor in tensors_in(output) for name in self._settled(traced.lookup(tensor))}
        for known in self._known.values():
            if known.outputs is not None:
                known.is_model_output |= returned.issuperset(self._settled(known.outputs))
        self._wiring = {name: self._settle(known) for name, known in self._known.items()}

    def abandon(self) -> None:
        """End a pass under way without looking at it."""
        if self._pass is not None:
            self._pass.__exit__(None, None, None)
        self._pass = None

    def wiring(self) -> dict[str, LayerWiring]:
        """Return layer name to what is known of it, the same object until something new is known."""
        return self._wiring

    def trace_again(self) -> None:
        """Trace the next pass of every module too."""
        self._traced.clear()

    def _note_unknown(self, layer: ServedLayer) -> None:
        """Trace the next pass of the module under way too if nothing is known of a layer that it calls."""
        if layer.name not in self._known and self._begun is not None:
            self._traced.discard(self._begun)

    def _note_input(self, known: _Known, layer: ServedLayer, module: nn.Module, layer_input: Tensor) -> None:
        """Equate the layer's input neurons with those that arrived."""
        known.reads_model_input &= self._pass.is_model_input(layer_input)
        if layer.adapter.structure == "table" or layer_input.dim() == 0:
            return
        axis = layer.adapter.neuron_axis(module) % layer_input.dim()
        arrived = self._pass.along(layer_input, axis)
        if arrived is None:
            arrived = self._names.fresh(layer_input.shape[axis])
        self._pass.assign(layer_input, axis, arrived)
        read = layer.adapter.input_neurons(module, arrived)
        if known.inputs is None:
            known.inputs = read
        elif known.inputs.shape == read.shape:
            self._names.equate(known.inputs, read)

    def _note_output(self, known: _Known, layer: ServedLayer, module: nn.Module, output: Tensor) -> None:
        """Name the neurons of the layer's output: its own, or those of its input if it scales each by itself."""
        axis = layer.adapter.neuron_axis(module) % output.dim()
        if layer.adapter.structure == "diagonal":
            names = known.inputs if known.inputs is not None and len(known.inputs) == output.shape[axis] else None
            known.outputs = known.inputs
        else:
            names = known.wholes.setdefault(output.shape[axis], self._names.fresh(output.shape[axis]))
            known.outputs = names[layer.adapter.output_neurons(module)]
        if names is not None:
            self._pass.assign(output, axis, names)

    def _settle(self, known: _Known) -> LayerWiring:
        """Return what is known of a layer, with one name for each neuron."""
        inputs = None if known.inputs is None else self._names.settle(known.inputs)
        outputs = None if known.outputs is None else self._names.settle(known.outputs)
        return LayerWiring(inputs, outputs, known.reads_model_input, known.is_model_output)

    def _settled(self, names: Names) -> tuple[int, ...]:
        """Return settled names, unknown ones left out."""
        return () if names is None else self._names.settle(names[names != UNKNOWN])
