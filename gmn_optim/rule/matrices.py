"""Which parameters are matrices, and where their elements stand: what a basis of rows and columns can turn."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gmn_optim.rule.segments import Segment

LONGEST_SIDE = 8192
"""A longer side gets no basis."""


class Part(NamedTuple):
    """Where a parameter stands: the number of its chunk, and its own among the chunk's segments."""

    chunk: int
    segment: int


Pieces = list[list[Tensor]]
"""The elements of each segment (size), chunk by chunk."""


@dataclass(frozen=True)
class Matrix:
    """A weight as blocks (groups, o, i), with its layer's bias as a last column where both take the same steps.

    Attributes:
        weight: The weight.
        place: Where it stands.
        bias: Where its bias stands, or None.
        groups: Blocks, each with rows and columns of its own.
        rows: Outputs of a block, o.
        columns: Inputs of a block, i, the one of the bias among them.
        turns_rows: Whether rows have a basis.
        turns_columns: Whether columns have one.
    """

    weight: Segment
    place: Part
    bias: Part | None
    groups: int
    rows: int
    columns: int
    turns_rows: bool
    turns_columns: bool

    @property
    def has_basis(self) -> bool:
        """Return whether rows or columns have a basis."""
        return self.turns_rows or self.turns_columns

    @property
    def inputs(self) -> int:
        """Return the columns without that of the bias, 1 at least."""
        return max(self.columns - (self.bias is not None), 1)

    @property
    def size(self) -> int:
        """Return the number of elements, those of the bias among them."""
        return self.groups * self.rows * self.columns

    @property
    def parts(self) -> tuple[Part, ...]:
        """Return where the weight stands and, if there is one, the bias."""
        return (self.place,) if self.bias is None else (self.place, self.bias)

    def gather(self, pieces: Pieces) -> Tensor:
        """Return the elements of the matrix (groups, o, i)."""
        return self.joined([pieces[part.chunk][part.segment] for part in self.parts])

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the flat elements of weight and bias as one (groups, o, i), the bias as the last column."""
        shaped = [part.view(self.groups, self.rows, -1) for part in parts]
        return shaped[0] if self.bias is None else torch.cat(shaped, dim=-1)

    def cut(self, values: Tensor) -> list[Tensor]:
        """Return those parts of a tensor (groups, o, i) that are the weight's and, if there is one, the bias's."""
        return [values] if self.bias is None else [values[..., :-1], values[..., -1]]

    def scatter(self, values: Tensor, pieces: Pieces, factor: Tensor | None = None) -> None:
        """Put the elements of the matrix (groups, o, i), times a factor (), in the places of those that stand there."""
        for part, own in zip(self.parts, self.cut(values), strict=True):
            pieces[part.chunk][part.segment] = _times(own, factor).reshape(-1)


def _times(values: Tensor, factor: Tensor | None) -> Tensor:
    """Return values times a factor, None for one."""
    return values if factor is None else values * factor


def find_matrices(chunks: Sequence[tuple[int, Sequence[Segment]]]) -> tuple[Matrix, ...]:
    """Return the matrices among the segments of chunks, each chunk with the number of its clock.

    A bias goes with its layer's weight if both have the same clock; otherwise it is a vector. A matrix whose sides are
    both too long for a basis is one all the same: how far it steps depends on its sides.

    Example:
        >>> weight, bias = Segment("w", (3, 2), "0", "weight"), Segment("b", (3,), "0", "bias")
        >>> [(matrix.rows, matrix.columns) for matrix in find_matrices([(0, (weight, bias))])]
        [(3, 3)]
        >>> [(matrix.rows, matrix.columns) for matrix in find_matrices([(0, (weight,)), (1, (bias,))])]
        [(3, 2)]
    """
    found = [
        (clock, segment, Part(number, place))
        for number, (clock, segments) in enumerate(chunks)
        for place, segment in enumerate(segments)
    ]
    biases = {(clock, segment.layer): part for clock, segment, part in found if segment.role == "bias"}
    return tuple(
        _matrix(segment, part, biases.get((clock, segment.layer)))
        for clock, segment, part in found
        if segment.role in ("weight", "table", "other") and len(segment.shape) > 1 and segment.size
    )


def _matrix(weight: Segment, place: Part, bias: Part | None) -> Matrix:
    """Return the matrix of one weight."""
    rows, columns = weight.sides
    if weight.role != "weight":
        bias = None
    rows //= weight.groups
    turns_rows = rows <= LONGEST_SIDE and weight.role != "table"
    turns_columns = columns <= LONGEST_SIDE
    columns += bias is not None
    return Matrix(weight, place, bias, weight.groups, rows, columns, turns_rows, turns_columns)
