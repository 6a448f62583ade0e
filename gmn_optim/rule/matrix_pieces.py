"""What a nominal term with bases works on: pieces of the flat tensors, and corrections of the averages among them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gmn_optim.rule.layout import Layout
from gmn_optim.rule.nominal import AdamTerm, Buffers, ChunkInputs
from gmn_optim.rule.pieces import FlatPieces


class Corrections(NamedTuple):
    """Decay of the second moment, epsilon, and what both averages are divided by for their start at zero, each ()."""

    beta2: Tensor
    epsilon: Tensor
    first: Tensor
    second: Tensor


class ChunkCorrections:
    """Those of each chunk, worked out when they are first asked for: most steps need few.

    Args:
        term: Has decays and epsilon.
        chunks: The chunks.
        most: The largest decay of the second moment.
        averages: Whether the direction is made of an average of gradients.
        turns: Whether bases turn (), None if so.

    Example:
        >>> chunk = ChunkInputs(torch.zeros(2), (), torch.ones(()))
        >>> round(ChunkCorrections(AdamTerm(), [chunk])[0].second.item(), 6)
        0.001
    """

    def __init__(
        self,
        term: AdamTerm,
        chunks: Sequence[ChunkInputs],
        most: float = 1.0,
        averages: bool = True,
        turns: Tensor | None = None,
    ) -> None:
        self._term, self._chunks, self._most, self._averages, self._turns = term, chunks, most, averages, turns
        self._found: dict[int, Corrections] = {}

    def __getitem__(self, number: int) -> Corrections:
        """Return those of one chunk."""
        if number not in self._found:
            self._found[number] = self._work_out(self._chunks[number])
        return self._found[number]

    def _work_out(self, inputs: ChunkInputs) -> Corrections:
        """Return those of a chunk."""
        term, first = self._term, torch.ones_like(inputs.step)
        beta2 = term.scalar("beta2", self._turns).clamp_max(self._most)
        if self._averages:
            first = 1 - torch.pow(term.beta1() if inputs.momentum is None else inputs.momentum, inputs.step)
        return Corrections(beta2, term.scalar("epsilon", self._turns), first, 1 - torch.pow(beta2, inputs.step))


class MatrixPieces(NamedTuple):
    """Gradients, averages, second moments and directions, and where the term serves a body noise and gains."""

    gradients: FlatPieces
    averages: FlatPieces
    seconds: FlatPieces
    directions: FlatPieces
    of_body: tuple[FlatPieces, ...]

    @classmethod
    def cut(cls, layout: Layout, chunks: Sequence[ChunkInputs], averages: Sequence[Tensor]) -> "MatrixPieces":
        """Cut the flat tensors of all chunks."""
        seconds, *of_body = zip(*(inputs.buffers[1:] for inputs in chunks), strict=True)
        return cls(
            FlatPieces(layout, [inputs.gradient for inputs in chunks]),
            FlatPieces(layout, averages),
            FlatPieces(layout, seconds),
            FlatPieces(layout, None),
            tuple(FlatPieces(layout, flats) for flats in of_body),
        )

    def joined(self) -> list[tuple[Tensor, Buffers]]:
        """Return each chunk's direction and buffers as flat tensors."""
        parts = (each.joined() for each in (self.directions, self.averages, self.seconds, *self.of_body))
        return [(direction, tuple(buffers)) for direction, *buffers in zip(*parts, strict=True)]
