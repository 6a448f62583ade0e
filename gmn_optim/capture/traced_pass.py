"""A forward pass during which every tensor operation hands on the names of neurons, below autograd."""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gmn_optim.capture.neuron_names import UNKNOWN, Names, SameNames, pass_names


class TracedPass(TorchDispatchMode):
    """One forward pass in which names are handed on by every operation, below autograd.

    Args:
        names: Which names mean the same neuron; gets to know more.
        inputs: The tensors given to the model.

    Example:
        >>> names, x = SameNames(), torch.ones(2, 3)
        >>> with TracedPass(names, [x]) as traced:
        ...     traced.assign(x, 1, names.fresh(3))
        ...     y = (2 * x).T
        >>> traced.lookup(y).shape
        torch.Size([3, 1])
    """

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

    def __init__(self, traced: TracedPass) -> None:
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


def tensors_in(value: Any, depth: int = 3) -> Iterator[Tensor]:
    """Yield the tensors in a value, also in tuples, lists, dicts and objects that are mappings."""
    if isinstance(value, Tensor):
        yield value
    elif depth > 0 and isinstance(value, (tuple, list, Mapping)):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(entry, depth - 1)


def _storage_of(tensor: Tensor) -> dict[int, int]:
    """Return storage address to version; an overwritten input is no longer the input."""
    if not _is_plain(tensor) or tensor.is_inference():
        return {}
    return {tensor.untyped_storage().data_ptr(): tensor._version}
