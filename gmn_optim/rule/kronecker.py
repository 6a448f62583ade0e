"""Adam in the eigenbasis of the Kronecker factors that each data point's gradient gives."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gmn_optim.gradients import DecomposedGradient
from gmn_optim.rule.basis import (
    Basis,
    eigenbases,
    follow,
    init_basis,
    into,
    moments_of_factors,
    moments_of_gradient,
    out_of,
    renew,
)
from gmn_optim.rule.coordinates import Coordinates, turn_rows
from gmn_optim.rule.layout import Layout
from gmn_optim.rule.matrices import Matrix, Pieces
from gmn_optim.rule.nominal import LEAST_SQUARE, AdamTerm, Buffers, ChunkInputs, Surroundings, nominal_terms
from gmn_optim.rule.scalars import Decay, LogScalar

FIRST_STEPS = 10
"""The basis is made anew at each of so many first steps, in which the averages change most."""

YOUNG, YOUNG_EVERY = 100, 10
"""Until this age, bases are made anew at least every so many steps."""

TIE_BREAK = 1e-3
"""Share of this step's Gram matrices in a basis that is made from them. With none of it, the basis and with it the step
would hang on rounding errors where those of earlier steps lack rank."""


@nominal_terms.register("kronecker_adam")
class KroneckerAdamTerm(AdamTerm):
    """Adam in the basis in which the gradient of a matrix is least correlated; plain Adam on vectors.

    The basis of a layer's outputs are the eigenvectors of E[g g^T], that of its inputs those of E[a a^T] with a 1 for
    the bias, both over data points and positions. Where no factors explain the gradient they are those of its Gram
    matrices of earlier steps (the axes at the first): in its own singular vectors a gradient is nothing but a diagonal.
    This step's count for a thousandth there, which settles directions that earlier gradients leave open.

    The average of gradients stays in the parameter's own coordinates, the one of squared gradients in the basis: when
    the basis turns, each new direction takes its share of it by the squared cosines with the old directions.

    Args:
        refresh_every: Steps between two bases, after the first ten steps. Until the hundredth it is ten at most.
        method: How a basis is made, ``eigh`` or ``qr``.

    Reference:
        George et al. (2018), "Fast approximate natural gradient descent in a Kronecker-factored eigenbasis",
        arXiv 1806.03884; Vyas et al. (2024), "SOAP", arXiv 2409.11321, for the Gram matrices and the momentum.

    Example:
        >>> KroneckerAdamTerm().is_due(1), KroneckerAdamTerm().is_due(11), KroneckerAdamTerm().is_due(20)
        (True, False, True)
    """

    default_alpha = 0.01
    uses_factors = True
    averages_gradients = True
    """Whether the direction is made of an average of gradients; otherwise of the gradient itself."""
    tracks_noise = False
    """Whether it keeps an average of the noise that the rows of factors show, in the basis, for a learned body."""

    def __init__(self, refresh_every: int = 50, method: str = "eigh") -> None:
        super().__init__()
        self.refresh_every, self.method = refresh_every, eigenbases[method]
        self.factor_decay = Decay(0.95)
        self.damping = LogScalar(1e-4)

    def track_noise(self) -> None:
        """Keep the noise from now on, as one more buffer."""
        if not self.tracks_noise:
            self.tracks_noise, self.buffers_per_parameter = True, self.buffers_per_parameter + 1

    def init_bases(self, layout: Layout, like: Tensor) -> tuple[Basis, ...]:
        """Return the axes as the bases of every matrix."""
        return tuple(init_basis(matrix, like) for matrix in layout.matrices)

    def is_due(self, age: int | Tensor) -> bool | Tensor:
        """Return whether a basis is made anew at the step that is its ``age``-th."""
        young = (age <= YOUNG) & (age % min(self.refresh_every, YOUNG_EVERY) == 0)
        return (age <= FIRST_STEPS) | young | (age % self.refresh_every == 0)

    def directions(
        self, chunks: Sequence[ChunkInputs], bases: tuple[Basis, ...], around: Surroundings
    ) -> tuple[list[tuple[Tensor, Buffers]], tuple[Basis, ...]]:
        """Return Adam's directions and buffers, those of matrices in their bases, and the new bases."""
        plain = [self.normalized(chunk) for chunk in chunks]
        pieces = _Pieces.cut(around.layout, chunks, plain)
        corrected = [self._corrections(chunk) for chunk in chunks]
        turned = [
            self._turn(matrix, old, pieces, corrected[matrix.place.chunk], around)
            for matrix, old in zip(around.layout.matrices, bases, strict=True)
        ]
        steps = [each.step for each in turned] if around.change is None else around.change(turned)
        for each, step in zip(turned, steps, strict=True):
            scaled = step * self.matrix_scale(each, around)
            each.matrix.scatter(out_of(each.basis, scaled), pieces.directions)
        return pieces.joined(), tuple(each.basis for each in turned)

    def normalized(self, inputs: ChunkInputs) -> tuple[Tensor, Buffers]:
        """Return the direction of a chunk outside of any basis, and the new buffers."""
        average, second, *noise = inputs.buffers
        direction, buffers = self.direction(inputs.gradient, (average, second), inputs.step, inputs.momentum)
        return direction, (*buffers, *noise)

    def begin(self, matrix: Matrix, basis: Basis, around: Surroundings) -> Basis:
        """Return the basis, with what must be known from before the first step."""
        return basis

    def matrix_scale(self, each: Coordinates, around: Surroundings) -> Tensor | float:
        """Return what the steps of a matrix are multiplied by."""
        return 1.0

    def _corrections(self, inputs: ChunkInputs) -> "_Corrections":
        """Return a chunk's corrections for the averages' start at zero."""
        beta2, first = self.beta2(), torch.ones_like(inputs.step)
        if self.averages_gradients:
            beta1 = self.beta1() if inputs.momentum is None else inputs.momentum
            first = 1 - torch.pow(beta1, inputs.step)
        return _Corrections(beta2, self.epsilon(), first, 1 - torch.pow(beta2, inputs.step))

    def _turn(
        self, matrix: Matrix, old: Basis, pieces: "_Pieces", corrections: "_Corrections", around: Surroundings
    ) -> Coordinates:
        """Return a matrix in its new bases, and put the new second moments in their places."""
        gradient, factors = matrix.gather(pieces.gradients), around.factors.get(matrix.weight.layer)
        seconds = torch.stack([matrix.gather(each) for each in pieces.old_seconds])
        old = self.begin(matrix, old, around)
        basis, seconds = self._next_basis(matrix, old, gradient, seconds, factors, around.refresh)
        turned = into(basis, gradient)
        rows = turn_rows(matrix, basis, factors) if self.tracks_noise else None
        new = [turned.square()] if not self.tracks_noise else [turned.square(), torch.zeros_like(turned)]
        if rows is not None:
            new[1] = rows.noise()
        seconds = torch.lerp(torch.stack(new), seconds, corrections.beta2)
        for values, places in zip(seconds, pieces.seconds, strict=True):
            matrix.scatter(values, places)
        squares, *noise = (seconds / corrections.second).clamp_min(LEAST_SQUARE)
        average = matrix.gather(pieces.firsts)
        floor = corrections.epsilon + self.damping() * squares.mean().sqrt()
        root = squares.sqrt() + floor
        step = (into(basis, average) / corrections.first if self.averages_gradients else turned) / root
        shown = noise[0] if rows is not None else None
        return Coordinates(matrix, basis, turned, step, squares, floor, shown, rows, gradient, average)

    def _next_basis(
        self,
        matrix: Matrix,
        basis: Basis,
        gradient: Tensor,
        seconds: Tensor,
        factors: DecomposedGradient | None,
        refresh: bool,
    ) -> tuple[Basis, Tensor]:
        """Return the basis of this step, and the second moments of earlier ones (., groups, o, i) in it."""
        moments = None if factors is None else moments_of_factors(matrix, factors)
        explained, moments = moments is not None, moments or moments_of_gradient(matrix, gradient)
        old = basis._replace(age=basis.age + 1)
        followed = follow(old, moments, self.factor_decay())
        if not refresh:
            return followed, seconds
        due = self.is_due(old.age)
        if explained:
            renewed, seconds = renew(followed, seconds, due, self.method)
        else:
            renewed, seconds = renew(follow(old, moments, 1 - TIE_BREAK), seconds, due & (old.age > 1), self.method)
        return followed._replace(rows=renewed.rows, columns=renewed.columns), seconds


class _Corrections(NamedTuple):
    """Decay of the second moment, epsilon, and what both averages are divided by for their start at zero, each ()."""

    beta2: Tensor
    epsilon: Tensor
    first: Tensor
    second: Tensor


class _Pieces(NamedTuple):
    """The elements of each segment, chunk by chunk: of the gradient, of the averages and of the direction.

    Second moments are those of the mean gradient and, where the term tracks noise, of the noise.
    """

    gradients: Pieces
    firsts: Pieces
    old_seconds: tuple[Pieces, ...]
    seconds: tuple[Pieces, ...]
    directions: Pieces

    @classmethod
    def cut(cls, layout: Layout, chunks: Sequence[ChunkInputs], plain: Sequence[tuple[Tensor, Buffers]]) -> "_Pieces":
        """Cut the flat tensors of all chunks."""

        def pieces(flats: Iterable[Tensor]) -> Pieces:
            return [list(flat.split(chunk.sizes)) for chunk, flat in zip(layout.chunks, flats, strict=True)]

        return cls(
            pieces(inputs.gradient for inputs in chunks),
            pieces(buffers[0] for _, buffers in plain),
            tuple(map(pieces, zip(*(inputs.buffers[1:] for inputs in chunks), strict=True))),
            tuple(map(pieces, zip(*(buffers[1:] for _, buffers in plain), strict=True))),
            pieces(direction for direction, _ in plain),
        )

    def joined(self) -> list[tuple[Tensor, Buffers]]:
        """Return each chunk's direction and buffers as flat tensors."""
        return [
            (torch.cat(direction), tuple(torch.cat(each) for each in buffers))
            for direction, *buffers in zip(self.directions, self.firsts, *self.seconds, strict=True)
        ]
