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
from gmn_optim.rule.matrices import Matrix, Part, find_matrices
from gmn_optim.rule.segments import ROLES as ROLES
from gmn_optim.rule.segments import Segment as Segment


@dataclass(frozen=True)
class Chunk:
    """Parameters that are updated together as one flat tensor.

    Attributes:
        segments: The parameters in order.
        learned: Whether the learned term serves them; otherwise they get the nominal term alone.
        clock: Chunks of one number have taken the same steps, with the same momentum.
    """

    segments: tuple[Segment, ...]
    learned: bool
    clock: int = 0

    @cached_property
    def missed(self) -> bool:
        """Return whether the factors of all these parameters' layers were found not to explain their gradients."""
        return all(segment.missed for segment in self.segments)

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
        """Return the named tensors as one flat tensor, a view of the only one where that lies so in memory."""
        return joined([segment.flatten(tensors[segment.name]) for segment in self.segments])

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the flat tensor as tensors with the parameters' shapes."""
        pieces = zip(self.segments, flat.split(self.sizes), strict=True)
        return {segment.name: segment.unflatten(piece).reshape(segment.shape) for segment, piece in pieces}

    def tiles(self) -> list["Tile"]:
        """Return the chunk in pieces of bounded size: whole rows of one large tensor, or everything at once."""
        (first, *others), size = self.segments, self.size
        if others or size <= TILE_SIZE:
            return [Tile(slice(0, size), None)]
        columns = max(1, first.sides[1])
        step = max(1, TILE_SIZE // columns)
        bounds = [slice(row, min(row + step, size // columns)) for row in range(0, size // columns, step)]
        return [Tile(slice(rows.start * columns, rows.stop * columns), rows) for rows in bounds]

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

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        """Return the parameters that are matrices, each with the bias that belongs to it."""
        return find_matrices([(chunk.clock, chunk.segments) for chunk in self.chunks])

    @cached_property
    def vectors(self) -> tuple[tuple[Part, ...], ...]:
        """Return for each chunk the places of the parameters that belong to no matrix."""
        taken = {part for matrix in self.matrices for part in matrix.parts}
        return tuple(
            tuple(part for place in range(len(chunk.segments)) if (part := Part(number, place)) not in taken)
            for number, chunk in enumerate(self.chunks)
        )


def joined(pieces: Sequence[Tensor]) -> Tensor:
    """Return flat tensors end to end, the only one as it is.

    Example:
        >>> joined([torch.ones(1), torch.zeros(2)])
        tensor([1., 0., 0.])
    """
    return pieces[0] if len(pieces) == 1 else torch.cat([*pieces])


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


def build_chunks(segments: Iterable[Segment], learned: bool, clock: int = 0) -> list[Chunk]:
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
            chunks.append(_close(open_segments, learned, clock))
            open_segments = []
        open_segments.append(segment)
    return chunks + ([_close(open_segments, learned, clock)] if open_segments else [])


def _close(segments: Sequence[Segment], learned: bool, clock: int) -> Chunk:
    """Return a chunk of these segments in the order that the product layer writes."""
    return Chunk(tuple(sorted(segments, key=lambda segment: ROLES.index(segment.role))), learned, clock)


@constant()
def _averaging(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the matrix (s, size) that averages each segment."""
    rows = (torch.full((1, max(n, 1)), 1.0 / max(n, 1), dtype=dtype)[:, :n] for n in sizes)
    return torch.block_diag(*rows).to(device)


@constant()
def _segment_numbers(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the number of the segment that each element belongs to (size)."""
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(device)
