"""What backward passes leave behind of each layer, and how that is put together to factors."""

import math
import weakref
from typing import NamedTuple

import torch
from torch import nn

from gmn_optim.capture.adapters import AbstractLayerAdapter
from gmn_optim.capture.verification import ProbeSums
from gmn_optim.gradients import DecomposedGradient


class Record(NamedTuple):
    """One call of one layer, seen by one backward pass.

    Attributes:
        weight: Weak reference to the parameter that was used.
        kind: The adapter that knows the layer.
        forward: Number of the root forward pass that made the call.
        call: Running number of the call.
        backward: Which backward pass reached it.
        factors: What is kept of it: activations (b, p, i) and backprops (b, p, o).
        sums: The probe's sums over all rows, also those that are not kept.
        onto_gradient: Whether ``.grad`` held something when the backward pass came.
        row_scale: What the kept backprops were multiplied by for the rows that were left out.
    """

    weight: weakref.ref[nn.Parameter]
    kind: AbstractLayerAdapter
    forward: int
    call: int
    backward: int
    factors: DecomposedGradient
    sums: ProbeSums
    onto_gradient: bool
    row_scale: float = 1.0

    def for_squares(self) -> "Record":
        """Return the record with factors whose sum of squares, not whose sum, is about that of all rows."""
        if self.row_scale == 1.0:
            return self
        activations, backprops = self.factors
        return self._replace(factors=DecomposedGradient(activations, backprops / math.sqrt(self.row_scale)))


class RecordStore:
    """Records by the parameter that was used, so that tied and reused layers meet.

    Example:
        >>> store = RecordStore()
        >>> store.of(nn.Parameter(torch.ones(2, 3)))
        []
    """

    def __init__(self) -> None:
        self._records: dict[int, list[Record]] = {}

    def add(self, record: Record) -> None:
        """Append a record."""
        self._records.setdefault(id(record.weight()), []).append(record)

    def of(self, weight: nn.Parameter) -> list[Record]:
        """Return the records of ``weight``, oldest first."""
        # The identity may have passed from a deleted parameter to a new one.
        return [record for record in self._records.get(id(weight), ()) if record.weight() is weight]

    def keep_pass(self, weight: nn.Parameter, backward: int) -> None:
        """Drop the records of ``weight`` that another backward pass left."""
        kept = [record for record in self.of(weight) if record.backward == backward]
        self._records[id(weight)] = kept

    def clear(self) -> None:
        """Drop everything."""
        self._records.clear()


def assemble_factors(records: list[Record]) -> DecomposedGradient:
    """Return the factors of several calls as one set.

    Calls in the same root forward pass with the same number of data points are repeated uses by the same data
    points: they are put side by side along p. All else adds data points along b. Where the numbers of positions
    disagree, every row becomes a data point of its own, (R, 1, i) and (R, 1, o).

    Args:
        records: At least one record of one parameter and of one kind of layer.

    Example:
        >>> from gmn_optim.capture import GradientCapture
        >>> layer = nn.Linear(3, 3)
        >>> with GradientCapture(layer) as capture:
        ...     for batch in (torch.ones(5, 3), torch.ones(4, 3)):
        ...         layer(batch).sum().backward()
        >>> capture.gradients()[""].activations.shape
        torch.Size([9, 1, 3])
    """
    units: dict[tuple[int, int], list[DecomposedGradient]] = {}
    for record in sorted(records, key=lambda record: (record.forward, record.backward, record.call)):
        units.setdefault((record.forward, record.backward), []).append(record.factors)
    parts = [part for unit in units.values() for part in _join_positions(unit)]
    if len({part.activations.shape[1] for part in parts}) > 1:
        parts = [DecomposedGradient(*(factor.flatten(0, 1).unsqueeze(1) for factor in part)) for part in parts]
    return _concatenate(parts, 0)


def _join_positions(unit: list[DecomposedGradient]) -> list[DecomposedGradient]:
    """Put the uses by the same data points side by side, if they can be."""
    if len({part.activations.shape[0] for part in unit}) > 1:
        return unit
    return [_concatenate(unit, 1)]


def _concatenate(parts: list[DecomposedGradient], axis: int) -> DecomposedGradient:
    """Concatenate along one axis, without a copy when there is nothing to concatenate."""
    if len(parts) == 1:
        return parts[0]
    return DecomposedGradient(*(torch.cat(factors, axis) for factors in zip(*parts, strict=True)))
