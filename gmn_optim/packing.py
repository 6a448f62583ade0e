"""From a torch optimizer's per-parameter state to the flat state of the update rule, and views back.

``optimizer.state[p]`` holds views of the flat tensors, so that saving, moving and copying an optimizer see ordinary
per-parameter entries while a step works on few large tensors.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gmn_optim.neurons import LayerPorts
from gmn_optim.rule import Chunk, Layout, RuleState, UpdateRule
from gmn_optim.rule.basis import Basis
from gmn_optim.rule.update import ChunkState

StateByName = Mapping[str, MutableMapping[str, Any]]


def pack_state(rule: UpdateRule, layout: Layout, state: StateByName, like: Tensor) -> RuleState:
    """Return the rule's state with fresh flat tensors, filled with what ``state`` has; the rest starts anew.

    Afterwards the entries in ``state`` are views of the flat tensors.

    Args:
        rule: The update rule.
        layout: Which parameters stand where.
        state: Parameter name to its entries in the optimizer's state.
        like: A tensor with the dtype and device of the computation.
    """
    packed = rule.init_state(layout, like)
    for chunk, flat in zip(layout.chunks, packed.chunks, strict=True):
        _exchange_chunk(chunk, flat, state)
    for matrix, basis in zip(layout.matrices if packed.bases else (), packed.bases, strict=True):
        _exchange_basis(basis, state[matrix.weight.name])
    if packed.memory.numel() and layout.spaces is not None:
        for ports in layout.spaces.layers:
            _exchange_layer(rule, layout, packed, ports, state)
    return packed


def overwrite_state(old: RuleState, new: RuleState) -> None:
    """Copy a new state into the tensors of the old one, of which ``optimizer.state`` holds views."""
    changed = [(to, value) for to, value in zip(_tensors(old), _tensors(new), strict=True) if to is not value]
    torch._foreach_copy_([to for to, _ in changed], [value for _, value in changed])


def _tensors(state: RuleState) -> list[Tensor]:
    """Return all tensors of a state in order."""
    of_chunks = [tensor for chunk in state.chunks for tensor in (chunk.step, chunk.averages, *chunk.nominal)]
    return [*of_chunks, *(tensor for basis in state.bases for tensor in basis), state.memory, state.step]


def restore_precision(
    state: Mapping[Tensor, MutableMapping[str, Any]], parameters: Sequence[Tensor], saved: Mapping[str, Any]
) -> None:
    """Undo a load's cast to the parameter's dtype, which would round, and share no memory with what was loaded.

    Args:
        state: The optimizer's state after the load.
        parameters: All parameters of the optimizer, in order.
        saved: The state dict that was loaded.
    """
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    for parameter, number in zip(parameters, numbers, strict=True):
        for key, value in saved["state"].get(number, {}).items():
            entry = state[parameter].get(key)
            if isinstance(value, Tensor) and isinstance(entry, Tensor) and value.shape == entry.shape:
                state[parameter][key] = value.to(parameter.device, copy=True)


def _exchange_chunk(chunk: Chunk, flat: ChunkState, state: StateByName) -> None:
    """Fill a chunk from the entries of its parameters, and put views there."""
    start = 0
    for segment in chunk.segments:
        entries = state[segment.name]
        views = {"step": flat.step}
        place = slice(start, start + segment.size)
        if flat.averages.shape[1]:
            views["averages"] = segment.unflatten(flat.averages[place])
        for number, buffer in enumerate(flat.nominal):
            views[f"nominal_{number}"] = segment.unflatten(buffer[place])
        _exchange(entries, views)
        start += segment.size


def _exchange_basis(basis: Basis, entries: MutableMapping[str, Any]) -> None:
    """Fill one matrix's basis from the entries of its weight, all of it or nothing, and put its tensors there."""
    views = {f"basis_{field}": value for field, value in basis._asdict().items()}
    memory, view = entries.get("basis_memory"), views["basis_memory"]
    if isinstance(memory, Tensor) and memory.ndim == 1 and 0 < len(memory) < len(view):
        # an older version remembered less of a training; the rest starts anew
        entries["basis_memory"] = torch.nn.functional.pad(memory, (0, len(view) - len(memory)))
    if any(getattr(entries.get(key), "shape", None) != view.shape for key, view in views.items()):
        # with another bias or limit the sides are others; the weight's size before the first step is what it was
        entries.update(dict.fromkeys(key for key in views if key != "basis_size"))
    _exchange(entries, views)


def _exchange_layer(rule: UpdateRule, layout: Layout, packed: RuleState, ports: LayerPorts, state: StateByName) -> None:
    """Fill one layer's part of the factor memory from the entries of its first parameter, and put views there."""
    owner = memory_owner(layout, ports.name)
    if owner is None or layout.spaces is None:
        return
    views = rule.memory.of_layer(packed.memory, layout.spaces, ports)
    _exchange(state[owner], {**views, "memory_step": packed.step})


def memory_owner(layout: Layout, layer: str) -> str | None:
    """Return the name of the parameter whose state keeps the factor memory of a layer."""
    for chunk in layout.chunks:
        for segment in chunk.segments:
            if segment.layer == layer:
                return segment.name
    return None


def _exchange(entries: MutableMapping[str, Any], views: Mapping[str, Tensor]) -> None:
    """Copy entries of the right shape into the views, then let the views take their place."""
    for key, view in views.items():
        old = entries.get(key)
        if isinstance(old, Tensor) and old.shape == view.shape:
            view.copy_(old)
        elif isinstance(old, (int, float)) and view.dim() == 0:
            view.fill_(old)
        entries[key] = view
