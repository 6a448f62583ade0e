"""How the bases of matrices follow factors, or gradients where no factors explain them, from look to look."""

import torch
from torch import Tensor

from gmn_optim.gradients import DecomposedGradient
from gmn_optim.rule.basis import Basis, Eigenbasis, follow, moments_of_factors, moments_of_gradient, renew
from gmn_optim.rule.look_schedule import Look, LookSchedule, choose
from gmn_optim.rule.matrices import Matrix
from gmn_optim.rule.matrix_pieces import MatrixPieces
from gmn_optim.rule.nominal import Surroundings
from gmn_optim.rule.scalars import Decay

TIE_BREAK = 1e-3
"""Share of this step's Gram matrices in a basis that is made from them. With none of it, the basis and with it the step
would hang on rounding errors where those of earlier steps lack rank."""


class FollowedBases(LookSchedule):
    """The part of a nominal term that keeps bases.

    Attributes:
        factor_decay: Of the moving averages of second moments, from look to look.
        method: How a basis is made of a short side's second moment.
    """

    factor_decay: Decay
    method: Eigenbasis

    def turn_basis(
        self, matrix: Matrix, old: Basis, look: Look, gradient: Tensor, pieces: MatrixPieces, around: Surroundings
    ) -> Basis:
        """Return the basis of this step, and turn the second moments of earlier ones into it."""
        if not around.looks:
            return old._replace(age=old.age + 1)
        factors = around.factors.get(matrix.weight.layer)
        if not around.refresh:
            return self._next_basis(matrix, old, look, gradient, None, factors)[0]
        turning = [pieces.seconds, *pieces.of_body[:1]]
        seconds = torch.stack([each.of(matrix) for each in turning])
        basis, seconds = self._next_basis(matrix, old, look, gradient, seconds, factors, around.turns)
        for each, values in zip(turning, seconds, strict=True):
            each.put(matrix, values)
        return basis

    def _next_basis(
        self,
        matrix: Matrix,
        basis: Basis,
        look: Look,
        gradient: Tensor,
        seconds: Tensor | None,
        factors: DecomposedGradient | None,
        turns: Tensor | None = None,
    ) -> tuple[Basis, Tensor | None]:
        """Return the basis of this step, and second moments of earlier ones (., groups, o, i) in it.

        Without them the basis is not made anew.
        """
        moments = None if factors is None else moments_of_factors(matrix, factors)
        explained, moments = moments is not None, moments or moments_of_gradient(matrix, gradient)
        old = basis._replace(age=basis.age + 1)
        # side by side, only trainings at whose own step that is due may look
        followed = follow(old, moments, choose(look.follows, self.factor_decay(), 1.0))
        if seconds is None:
            return followed, None
        due = look.is_due if turns is None else turns & look.is_due
        if explained:
            renewed, seconds = renew(followed, seconds, due, self.method)
        else:
            renewed, seconds = renew(follow(old, moments, 1 - TIE_BREAK), seconds, (old.age > 1) & due, self.method)
        return followed._replace(rows=renewed.rows, columns=renewed.columns), seconds
