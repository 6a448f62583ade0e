"""How a model's parameters are laid out for the update rule: chunks of flat tensors.

Small tensors share a chunk, so that a step is a few large operations. Within a chunk the weight matrices that the
learned term serves come first, their biases next.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from gmn_optim.constants import constant
from gmn_optim.neurons import NeuronSpaces
from gmn_optim.weight_order import WeightOrder

ROLES = ("weight", "table", "scale", "bias", "other")
"""Roles of a parameter in its layer, in the order in which they stand in a chunk."""


@dataclass(frozen=True)
class Segment:
    """One parameter's place in a chunk.

    Attributes:
        name: Full name of the parameter.
        shape: Its shape.
        layer: Name of the captured layer that it belongs to, or None.
        role: What it is in that layer, one of :data:`ROLES`; ``other`` if there is none.
        order: How it lies in memory, if otherwise than outputs first.

    Example:
        >>> Segment("w", (3, 2), order=WeightOrder((3, 2), (1, 0))).flatten(torch.arange(6).view(3, 2)).tolist()
        [0, 2, 4, 1, 3, 5]
    """

    name: str
    shape: tuple[int, ...]
    layer: str | None = None
    role: str = "other"
    order: WeightOrder | None = None

    def flatten(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the parameter's shape as a flat one, outputs first."""
        return (tensor if self.order is None else self.order.arrange(tensor)).reshape(-1)

    def unflatten(self, flat: Tensor) -> Tensor:
        """Return a flat tensor (size, ...) as a view with the parameter's shape, or with its sizes in memory."""
        if self.order is None:
            return flat.view(self.shape + tuple(flat.shape[1:]))
        return self.order.restore(flat)

    @cached_property
    def size(self) -> int:
        """Return the number of elements."""
        size = 1
        for side in self.shape:
            size *= side
        return size


@dataclass(frozen=True)
class Chunk:
    """Parameters that are updated together as one flat tensor.

    Attributes:
        segments: The parameters in order.
        learned: Whether the learned term serves them; otherwise they get the nominal term alone.
    """

    segments: tuple[Segment, ...]
    learned: bool

    @cached_property
    def size(self) -> int:
        """Return the number of elements of all segments."""
        return sum(segment.size for segment in self.segments)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Return the number of elements of each segment."""
        return tuple(segment.size for segment in self.segments)

    def layers_in_role(self, role: str) -> tuple[str, ...]:
        """Return the layers whose parameter of this role stands here, in order."""
        return tuple(s.layer for s in self.segments if s.role == role and s.layer is not None)

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the named tensors as one flat tensor."""
        return torch.cat([segment.flatten(tensors[segment.name]) for segment in self.segments])

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the flat tensor as tensors with the parameters' shapes."""
        pieces = zip(self.segments, flat.split(self.sizes), strict=True)
        return {segment.name: segment.unflatten(piece).reshape(segment.shape) for segment, piece in pieces}

    def tiles(self) -> list["Tile"]:
        """Return the chunk in pieces of bounded size: whole rows of one large tensor, or everything at once."""
        (first, *others), size = self.segments, self.size
        if others or size <= TILE_SIZE:
            return [Tile(slice(0, size), None)]
        columns = max(1, size // max(1, self._rows_of(first)))
        step = max(1, TILE_SIZE // columns)
        bounds = [slice(row, min(row + step, size // columns)) for row in range(0, size // columns, step)]
        return [Tile(slice(rows.start * columns, rows.stop * columns), rows) for rows in bounds]

    @staticmethod
    def _rows_of(segment: Segment) -> int:
        """Return the number of rows of the matrix that a segment is."""
        if segment.order is None:
            return segment.shape[0]
        return segment.size // segment.order.sizes[segment.order.axes[-1]]

    def mean_per_segment(self, values: Tensor) -> Tensor:
        """Return the mean over each segment (s, c) of values (size, c)."""
        if len(self.segments) == 1:
            return values.mean(0, keepdim=True)
        return _averaging(self.sizes, values.dtype, values.device) @ values

    def per_element(self, values: Tensor) -> Tensor:
        """Return each segment's values (s, c) at each of its elements (size, c)."""
        if len(self.segments) == 1:
            return values
        return values[_segment_numbers(self.sizes, values.device)]


@dataclass(frozen=True)
class Layout:
    """The chunks of a model and, where the rule looks at neurons, its neuron spaces."""

    chunks: tuple[Chunk, ...]
    spaces: NeuronSpaces | None = None


class Tile(NamedTuple):
    """A piece of a chunk.

    Attributes:
        place: Its elements.
        rows: Its rows, where the chunk is one large tensor in several tiles, else None.
    """

    place: slice
    rows: slice | None


TILE_SIZE = 65_536
"""The learned term works on at most about this many elements at a time: a few megabytes of features."""

CHUNK_SIZE = 16_384
"""Chunks are closed at this many elements: large enough for few operations, small enough for the averaging matrix."""


def build_chunks(segments: Iterable[Segment], learned: bool) -> list[Chunk]:
    """Return chunks of the given segments, in the order of :data:`ROLES`, small ones together.

    Example:
        >>> chunks = build_chunks([Segment("w", (3, 2), "0", "weight"), Segment("b", (3,), "0", "bias")], True)
        >>> [chunk.size for chunk in chunks]
        [9]
    """
    open_segments: list[Segment] = []
    chunks = []
    for segment in segments:
        if open_segments and sum(s.size for s in open_segments) + segment.size > CHUNK_SIZE:
            chunks.append(_close(open_segments, learned))
            open_segments = []
        open_segments.append(segment)
    return chunks + ([_close(open_segments, learned)] if open_segments else [])


def _close(segments: Sequence[Segment], learned: bool) -> Chunk:
    """Return a chunk of these segments in the order that the product layer writes."""
    return Chunk(tuple(sorted(segments, key=lambda segment: ROLES.index(segment.role))), learned)


@constant()
def _averaging(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the matrix (s, size) that averages each segment."""
    rows = (torch.full((1, max(n, 1)), 1.0 / max(n, 1), dtype=dtype)[:, :n] for n in sizes)
    return torch.block_diag(*rows).to(device)


@constant()
def _segment_numbers(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the number of the segment that each element belongs to (size)."""
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(device)
