"""Adam in the eigenbasis of the Kronecker factors that each data point's gradient gives."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

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
from gmn_optim.rule.layout import Layout
from gmn_optim.rule.matrices import Matrix, Pieces
from gmn_optim.rule.nominal import LEAST_SQUARE, AdamTerm, Buffers, ChunkInputs, Surroundings, nominal_terms
from gmn_optim.rule.scalars import Decay, LogScalar

FIRST_STEPS = 10
"""The basis is made anew at each of so many first steps, in which the averages change most."""

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
        refresh_every: Steps between two bases, after the first ten steps.
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

    def __init__(self, refresh_every: int = 10, method: str = "eigh") -> None:
        super().__init__()
        self.refresh_every, self.method = refresh_every, eigenbases[method]
        self.factor_decay = Decay(0.95)
        self.damping = LogScalar(1e-4)

    def init_bases(self, layout: Layout, like: Tensor) -> tuple[Basis, ...]:
        """Return the axes as the bases of every matrix."""
        return tuple(init_basis(matrix, like) for matrix in layout.matrices)

    def is_due(self, age: int | Tensor) -> bool | Tensor:
        """Return whether a basis is made anew at the step that is its ``age``-th."""
        return (age <= FIRST_STEPS) | (age % self.refresh_every == 0)

    def directions(
        self, chunks: Sequence[ChunkInputs], bases: tuple[Basis, ...], around: Surroundings
    ) -> tuple[list[tuple[Tensor, Buffers]], tuple[Basis, ...]]:
        """Return Adam's directions and buffers, those of matrices in their bases, and the new bases."""
        plain, _ = super().directions(chunks, (), around)
        pieces, decay, damping = _Pieces.cut(around.layout, chunks, plain), self.factor_decay(), self.damping()
        corrected = [self._corrections(chunk) for chunk in chunks]
        renewed = []
        for matrix, old in zip(around.layout.matrices, bases, strict=True):
            gradient = matrix.gather(pieces.gradients)
            basis, second = self._next_basis(matrix, old, gradient, matrix.gather(pieces.old_seconds), around, decay)
            self._take_step(matrix, basis, gradient, second, pieces, corrected[matrix.place.chunk], damping)
            renewed.append(basis)
        joined = zip(pieces.directions, pieces.firsts, pieces.seconds, strict=True)
        return [(torch.cat(d), (torch.cat(m), torch.cat(v))) for d, m, v in joined], tuple(renewed)

    def _corrections(self, inputs: ChunkInputs) -> "_Corrections":
        """Return a chunk's corrections for the averages' start at zero."""
        beta1, beta2 = self.beta1() if inputs.momentum is None else inputs.momentum, self.beta2()
        powers = (1 - torch.pow(beta, inputs.step) for beta in (beta1, beta2))
        return _Corrections(beta2, self.epsilon(), *powers)

    def _next_basis(
        self, matrix: Matrix, basis: Basis, gradient: Tensor, second: Tensor, around: Surroundings, decay: Tensor
    ) -> tuple[Basis, Tensor]:
        """Return the basis of this step, and the second moment of earlier ones (groups, o, i) in it."""
        factors = around.factors.get(matrix.weight.layer)
        moments = None if factors is None else moments_of_factors(matrix, factors)
        explained, moments = moments is not None, moments or moments_of_gradient(matrix, gradient)
        old = basis._replace(age=basis.age + 1)
        followed = follow(old, moments, decay)
        if not around.refresh:
            return followed, second
        due = self.is_due(old.age)
        if explained:
            renewed, second = renew(followed, second, due, self.method)
        else:
            renewed, second = renew(follow(old, moments, 1 - TIE_BREAK), second, due & (old.age > 1), self.method)
        return followed._replace(rows=renewed.rows, columns=renewed.columns), second

    @staticmethod
    def _take_step(
        matrix: Matrix,
        basis: Basis,
        gradient: Tensor,
        second: Tensor,
        pieces: "_Pieces",
        corrections: "_Corrections",
        damping: Tensor,
    ) -> None:
        """Replace a matrix's plain direction and second moment by those in its basis."""
        second = torch.lerp(into(basis, gradient).square(), second, corrections.beta2)
        squares = (second / corrections.second).clamp_min(LEAST_SQUARE)
        floor = corrections.epsilon + damping * squares.mean().sqrt()
        turned = into(basis, matrix.gather(pieces.firsts)) / (corrections.first * (squares.sqrt() + floor))
        matrix.scatter(out_of(basis, turned), pieces.directions)
        matrix.scatter(second, pieces.seconds)


class _Corrections(NamedTuple):
    """Decay of the second moment, epsilon, and what both averages are divided by for their start at zero, each ()."""

    beta2: Tensor
    epsilon: Tensor
    first: Tensor
    second: Tensor


class _Pieces(NamedTuple):
    """The elements of each segment, chunk by chunk: of the gradient, of Adam's averages and of its direction."""

    gradients: Pieces
    old_seconds: Pieces
    firsts: Pieces
    seconds: Pieces
    directions: Pieces

    @classmethod
    def cut(cls, layout: Layout, chunks: Sequence[ChunkInputs], plain: Sequence[tuple[Tensor, Buffers]]) -> "_Pieces":
        """Cut the flat tensors of all chunks."""
        of_chunks = [
            (inputs.gradient, inputs.buffers[1], *buffers, direction)
            for inputs, (direction, buffers) in zip(chunks, plain, strict=True)
        ]
        return cls(
            *(
                [list(flat.split(chunk.sizes)) for chunk, flat in zip(layout.chunks, flats, strict=True)]
                for flats in zip(*of_chunks, strict=True)
            )
        )
