"""A matrix's gradient and its statistics in the coordinates of its bases."""

from typing import NamedTuple

from torch import Tensor

from gmn_optim.gradients import DecomposedGradient
from gmn_optim.rule.basis import Basis, out_of, rows_of_factors
from gmn_optim.rule.look_schedule import NO_LOOK, Look
from gmn_optim.rule.matrices import Matrix
from gmn_optim.rule.sides import turn


class TurnedRows(NamedTuple):
    """Factors of each row (a data point at a position) in the bases, or as they are: squared norms are the same.

    Attributes:
        activations: (groups, r, i), with a 1 for the bias before the turn.
        backprops: (groups, r, o), of the mean loss.
    """

    activations: Tensor
    backprops: Tensor

    def noise(self) -> Tensor:
        """Return the sum over rows of squared gradients (groups, o, i).

        Backprops carry the loss's 1/b, so this is what the square of the mean gradient would be, in expectation, if the
        gradients of rows were independent with mean zero: pure noise.

        Example:
            >>> import torch
            >>> TurnedRows(torch.ones(1, 4, 1), torch.full((1, 4, 1), 0.25)).noise()
            tensor([[[0.2500]]])
        """
        return self.backprops.square().mT @ self.activations.square()


class Coordinates(NamedTuple):
    """What a learned body sees of a matrix, in the coordinates of the bases up to ``gain``.

    Where preconditioners make the step nothing is turned: gradient and step are in the parameter's own coordinates.

    Attributes:
        matrix: The matrix.
        basis: Its bases.
        gradient: The mean gradient (groups, o, i).
        step: The nominal step at step size 1 (groups, o, i).
        squares: Moving average of squared mean gradients, corrected for its start at zero (groups, o, i); None where
            nothing is turned, like the next two.
        floor: What the nominal term adds to roots of squares (): coordinates far below it are rounding errors.
        noise: Moving average of :meth:`TurnedRows.noise`; None where no factors explain the gradient, or none is kept.
        rows: Factors of each row, or None; turned if noise is kept.
        gain: What the learned term added when it looked last, as a share of the step; None without one.
        own_gradient: The mean gradient in the parameter's own coordinates: of weight and bias, each flat.
        average: The nominal term's average, likewise; nothing where no learned term looks at it.
        look: Whether this training looks at the factors, and for how many steps that stands.
        is_turned: Whether gradient and step are in the coordinates of the bases.
        own_step: The nominal step in the parameter's own coordinates (groups, o, i), where it was made there and turned
            for a body that reads coordinates in the bases.
        step_size: Root mean square of the step (), where it is known.
        bound: What the step is still to be multiplied by (), None for one; the size counts with it.
        age: How many steps the bases have followed, where the host knows.
    """

    matrix: Matrix
    basis: Basis
    gradient: Tensor
    step: Tensor
    squares: Tensor | None
    floor: Tensor | None
    noise: Tensor | None
    rows: TurnedRows | None
    gain: Tensor | None
    own_gradient: tuple[Tensor, ...]
    average: tuple[Tensor, ...]
    look: Look = NO_LOOK
    is_turned: bool = True
    own_step: Tensor | None = None
    step_size: Tensor | None = None
    bound: Tensor | None = None
    age: int | None = None

    def turned_back(self, step: Tensor) -> Tensor:
        """Return a changed step in the parameter's own coordinates; of one that was made there, only the change."""
        if not self.is_turned:
            return step
        if self.own_step is None:
            return out_of(self.basis, step)
        return self.own_step + out_of(self.basis, step - self.step)


def rows_of(matrix: Matrix, factors: DecomposedGradient | None) -> TurnedRows | None:
    """Return the factors of a matrix as they are; None without factors, or for a table."""
    rows = None if factors is None or matrix.weight.role == "table" else rows_of_factors(matrix, factors)
    return None if rows is None else TurnedRows(*rows)


def turn_rows(matrix: Matrix, basis: Basis, factors: DecomposedGradient | None) -> TurnedRows | None:
    """Return the factors of a matrix in its bases; None without factors, or for a table."""
    rows = rows_of(matrix, factors)
    if rows is None:
        return None
    activations, backprops = rows
    if basis.columns.numel():
        activations = turn(basis.columns, activations)
    if basis.rows.numel():
        backprops = turn(basis.rows, backprops)
    return TurnedRows(activations, backprops)
