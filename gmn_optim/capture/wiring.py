"""Which layers share neurons, found from what really flows through a forward pass of the whole model.

During a traced pass every tensor operation hands on the names of neurons (:mod:`gmn_optim.capture.neuron_names`). A
layer's output starts names of its own; a layer's input shows which names arrived there. What is not proven this way is
not claimed. One pass of the model is traced, or of each part that is called by itself, and another one when a layer is
called of which nothing is known yet.
"""

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gmn_optim.capture.layers import ServedLayer
from gmn_optim.capture.neuron_names import UNKNOWN, Names, SameNames, pass_names
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
        >>> tracker, layer, x = WiringTracker(), nn.Linear(3, 3), torch.ones(2, 3)
        >>> tracker.wiring()
        {}
    """

    def __init__(self) -> None:
        self._names = SameNames()
        self._known: dict[str, _Known] = {}
        self._wiring: dict[str, LayerWiring] = {}
        self._pass: _TracedPass | None = None
        self._begun: int | None = None
        self._traced: set[int] = set()
        self._passes: Counter[int] = Counter()

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Start a forward pass of a module with these arguments; it is traced if one of this module is due."""
        self.abandon()
        self._begun = id(module)
        if self._begun not in self._traced and self._passes[self._begun] < MOST_TRACED_PASSES:
            self._passes[self._begun] += 1
            self._pass = _TracedPass(self._names, (*_tensors_in(args), *_tensors_in(kwargs)))
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
        returned = {name for tensor in _tensors_in(output) for name in self._settled(traced.lookup(tensor))}
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


class _TracedPass(TorchDispatchMode):
    """One forward pass in which names are handed on by every operation, below autograd."""

    def __init__(self, names: SameNames, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self._same = names
        # storage addresses are given out anew, so each entry knows its storage, without keeping it alive
        self._names: dict[tuple[Any, ...], tuple[weakref.ref[Any], Tensor]] = {}
        self._inputs = {key: version for tensor in inputs for key, version in _storage_of(tensor).items()}
        self._is_paused = False

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Return True: compiled parts of a model are compiled all the same."""
        return True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Return True: they run the same, whatever of their operations is seen."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Run an operation, then hand on the names of its arguments."""
        output = func(*args, **(kwargs or {}))
        if not self._is_paused:
            with self.paused():
                self._hand_on(func, args, kwargs or {}, output)
        return output

    def lookup(self, tensor: Any) -> Names:
        """Return the names of a tensor, or None."""
        storage, names = self._names.get(_identity(tensor), _NOTHING) if _is_plain(tensor) else _NOTHING
        return names if storage() is not None else None

    def along(self, tensor: Tensor, axis: int) -> Tensor | None:
        """Return the names of a tensor along one axis (size), or None if they differ along others.

        Who reads a neuron has one weight for all of its elements, so that those of which nothing is known (a class
        token before the patches) are the same neuron as the others.
        """
        names = self.lookup(tensor)
        if names is None:
            return None
        rows = names.movedim(axis, -1).reshape(-1, names.shape[axis])
        found = rows.amax(0)  # less than all names is an unknown one
        if not bool(((rows == found) | (rows == UNKNOWN)).all()):
            return None
        found = found.expand(tensor.shape[axis]).clone()
        unknown = found == UNKNOWN
        found[unknown] = self._same.fresh(int(unknown.sum()))
        return found

    def assign(self, tensor: Tensor, axis: int, names: Tensor) -> None:
        """Give names (size) to a tensor's neurons along one axis."""
        self._keep(tensor, names.view([-1 if each == axis else 1 for each in range(tensor.dim())]))

    def is_model_input(self, tensor: Tensor) -> bool:
        """Whether a tensor is, or shares storage with, one given to the model."""
        return bool(_storage_of(tensor).items() & self._inputs.items())

    def paused(self) -> "_Paused":
        """Return a context in which operations hand on nothing."""
        return _Paused(self)

    def _hand_on(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], output: Any) -> None:
        """Find the names of what an operation returned, and forget those of what it wrote over."""
        written = _written(func, args, kwargs)
        if not written and all(self.lookup(each) is None for each in _leaves((args, kwargs))):
            return
        try:
            names = pass_names(func, args, kwargs, output, self.lookup, self._same.equate)
        except (RuntimeError, IndexError, TypeError, ValueError):
            names = []  # an unusual form of a known operation: its neurons stay unknown, which is safe
        pairs = zip(_leaves(output), names, strict=False)
        known = [(tensor, found) for tensor, found in pairs if found is not None and _fits(found, tensor)]
        for tensor in written:
            self._overwrite(tensor, next((found for each, found in known if each is tensor), None))
        for tensor, found in known:
            self._keep(tensor, found)

    def _overwrite(self, tensor: Tensor, names: Names) -> None:
        """Forget the names of all that shares memory with a tensor that was written over, unless it has the same."""
        before = self.lookup(tensor)
        if before is None or names is None or not torch.equal(before, names):
            storage = tensor.untyped_storage()._cdata
            self._names = {key: kept for key, kept in self._names.items() if key[0] != storage}

    def _keep(self, tensor: Tensor, names: Tensor) -> None:
        """Remember the names of a tensor."""
        if _is_plain(tensor):
            self._names[_identity(tensor)] = weakref.ref(tensor.untyped_storage()), names


class _Paused:
    """A context in which a traced pass hands on nothing."""

    def __init__(self, traced: _TracedPass) -> None:
        self._traced = traced

    def __enter__(self) -> None:
        self._before, self._traced._is_paused = self._traced._is_paused, True

    def __exit__(self, *exception: object) -> None:
        self._traced._is_paused = self._before


_NOTHING: tuple[Any, Names] = (lambda: None, None)
"""The entry of a tensor that has none."""


def _is_plain(tensor: Any) -> bool:
    """Whether a tensor has a storage to be known by."""
    if not isinstance(tensor, Tensor) or tensor.is_nested or tensor.layout is not torch.strided:
        return False
    return tensor.numel() > 0


def _leaves(value: Any) -> list[Tensor]:
    """Return the tensors in what an operation takes or returns."""
    return [each for each in _pytree.tree_leaves(value) if isinstance(each, Tensor)]


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors that an operation writes into."""
    if not func._schema.is_mutable:
        return []
    places = func._schema.arguments
    given = [*zip(args, places, strict=False), *((kwargs[p.name], p) for p in places if p.name in kwargs)]
    values = [value for value, place in given if place.alias_info is not None and place.alias_info.is_write]
    return [tensor for tensor in _leaves(values) if _is_plain(tensor)]


def _fits(names: Tensor, tensor: Tensor) -> bool:
    """Whether names have the sizes of a tensor, or one."""
    if names.dim() != tensor.dim():
        return False
    return all(one in (1, size) for one, size in zip(names.shape, tensor.shape, strict=True))


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Return what tells a tensor from all others alive: views made below and above autograd are different objects."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()


def _tensors_in(value: Any, depth: int = 3) -> Iterator[Tensor]:
    """Yield the tensors in a value, also in tuples, lists, dicts and objects that are mappings."""
    if isinstance(value, Tensor):
        yield value
    elif depth > 0 and isinstance(value, (tuple, list, Mapping)):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(entry, depth - 1)


def _storage_of(tensor: Tensor) -> dict[int, int]:
    """Return storage address to version; an overwritten input is no longer the input."""
    if not _is_plain(tensor) or tensor.is_inference():
        return {}
    return {tensor.untyped_storage().data_ptr(): tensor._version}
