"""Flat tensors of chunks as the pieces of their segments, of which a rule replaces some."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from gmn_optim.rule.layout import Layout, joined
from gmn_optim.rule.matrices import Matrix, Part

_NOTHING = torch.empty(0)
"""Stands where a piece is going to be put."""


class FlatPieces:
    """One flat tensor for each chunk, cut into the elements of each segment; those of a matrix are read and replaced.

    Args:
        layout: Which parameters stand where.
        flats: Of each chunk (size); None where every piece is going to be put.

    Example:
        >>> from gmn_optim.rule.layout import Segment, build_chunks
        >>> layout = Layout(tuple(build_chunks([Segment("w", (2, 3), "0", "weight")], False)))
        >>> pieces = FlatPieces(layout, [torch.zeros(6)])
        >>> pieces.put(layout.matrices[0], torch.ones(1, 2, 3))
        >>> pieces.joined()
        [tensor([1., 1., 1., 1., 1., 1.])]
    """

    def __init__(self, layout: Layout, flats: Sequence[Tensor] | None) -> None:
        self._flats = flats
        self._sizes = [chunk.sizes for chunk in layout.chunks]
        self._replaced: set[int] = set()

    @cached_property
    def _pieces(self) -> list[list[Tensor]]:
        """The elements of each segment, cut when they are first asked for."""
        if self._flats is None:
            return [[_NOTHING] * len(sizes) for sizes in self._sizes]
        return [list(flat.split(sizes)) for flat, sizes in zip(self._flats, self._sizes, strict=True)]

    def of(self, matrix: Matrix) -> Tensor:
        """Return the elements of a matrix (groups, o, i)."""
        return matrix.gather(self._pieces)

    def parts_of(self, matrix: Matrix) -> tuple[Tensor, ...]:
        """Return the elements of a matrix's weight (size) and, if it has one, of its bias (size), as they stand."""
        return tuple(self._pieces[part.chunk][part.segment] for part in matrix.parts)

    def put(self, matrix: Matrix, values: Tensor, factor: Tensor | None = None) -> None:
        """Put the elements of a matrix (groups, o, i), times a factor (), in the place of those that stand there."""
        matrix.scatter(values, self._pieces, factor)
        self._replaced.update(part.chunk for part in matrix.parts)

    def of_parts(self, parts: Sequence[Part]) -> Tensor:
        """Return the elements of some segments as one tensor."""
        return joined([self._pieces[part.chunk][part.segment] for part in parts])

    def put_parts(self, parts: Sequence[Part], values: Tensor) -> None:
        """Put the elements of some segments, as :meth:`of_parts` returns them, in their places."""
        sizes = [self._sizes[part.chunk][part.segment] for part in parts]
        for part, piece in zip(parts, values.split(sizes) if len(parts) > 1 else [values], strict=True):
            self._pieces[part.chunk][part.segment] = piece
        self._replaced.update(part.chunk for part in parts)

    def joined(self) -> list[Tensor]:
        """Return each chunk's flat tensor, the one that was given where nothing was replaced."""
        if self._flats is not None and not self._replaced:
            return [*self._flats]
        return [
            self._flats[number] if self._flats is not None and number not in self._replaced else joined(pieces)
            for number, pieces in enumerate(self._pieces)
        ]
