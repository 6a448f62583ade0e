"""How a model's parameters are laid out for the update rule: chunks of flat tensors.

Small tensors share a chunk, so that a step is a few large operations. Within a chunk the weight matrices that the
learned term serves come first, their biases next.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gmn_optim.constants import constant
from gmn_optim.neurons import NeuronSpaces


@dataclass(frozen=True)
class Segment:
    """One parameter's place in a chunk.

    Attributes:
        name: Full name of the parameter.
        shape: Its shape.
        layer: Name of the captured layer that it belongs to, or None.
        role: ``weight`` or ``bias`` of that layer; ``other`` if there is none.
    """

    name: str
    shape: tuple[int, ...]
    layer: str | None = None
    role: str = "other"

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
        return torch.cat([tensors[segment.name].reshape(-1) for segment in self.segments])

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the flat tensor as views with the parameters' shapes."""
        pieces = flat.split(self.sizes)
        return {segment.name: piece.view(segment.shape) for segment, piece in zip(self.segments, pieces, strict=True)}

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


CHUNK_SIZE = 16_384
"""Chunks are closed at this many elements: large enough for few operations, small enough for the averaging matrix."""


def build_chunks(segments: Iterable[Segment], learned: bool) -> list[Chunk]:
    """Return chunks of the given segments, weights before biases before others, small ones together.

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
    order = {"weight": 0, "bias": 1, "other": 2}
    return Chunk(tuple(sorted(segments, key=lambda segment: order[segment.role])), learned)


@constant(maxsize=256)
def _averaging(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the matrix (s, size) that averages each segment."""
    rows = (torch.full((1, max(n, 1)), 1.0 / max(n, 1), dtype=dtype)[:, :n] for n in sizes)
    return torch.block_diag(*rows).to(device)


@constant(maxsize=256)
def _segment_numbers(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the number of the segment that each element belongs to (size)."""
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(device)
