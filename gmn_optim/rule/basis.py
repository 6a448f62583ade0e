"""Eigenbases of a matrix's rows and columns: how they follow the gradients' second moments."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gmn_optim.gradients import DecomposedGradient
from gmn_optim.registry import Registry
from gmn_optim.rule.look_schedule import choose
from gmn_optim.rule.matrices import Matrix
from gmn_optim.rule.preconditioner import init_preconditioner, make_preconditioner, precondition, precondition_columns
from gmn_optim.rule.sides import (
    eigenvectors,
    follow_moment,
    init_side,
    is_square,
    leading_basis,
    second_moment,
    turn,
    turn_back,
    turn_columns,
    turn_columns_back,
    turn_squares,
)


class Basis(NamedTuple):
    """The bases of one matrix, and what they are made from. A side without a basis holds empty tensors.

    Those of a long side are of other shapes, see :mod:`gmn_optim.rule.sides`.

    Attributes:
        age: Steps that they have followed ().
        size: Root mean square of the weight before the first step (), where the nominal term asks for it.
        row_moment: Moving average of E[g g^T], with mean diagonal 1 (groups, o, o).
        column_moment: Moving average of E[a a^T], with mean diagonal 1 (groups, i, i).
        rows: Orthonormal columns (groups, o, o).
        columns: Orthonormal columns (groups, i, i).
        row_preconditioner: What the newest look made of the rows, see :mod:`gmn_optim.rule.preconditioner`; empty where
            the nominal term turns every gradient into the bases.
        column_preconditioner: The same of the columns.
        memory: What a learned term that decides matrix by matrix remembers of this one (m), zero at first.
    """

    age: Tensor
    size: Tensor
    row_moment: Tensor
    column_moment: Tensor
    rows: Tensor
    columns: Tensor
    row_preconditioner: Tensor
    column_preconditioner: Tensor
    memory: Tensor


class Moments(NamedTuple):
    """Second moments of one step, (groups, o, o) and (groups, i, i), or roots; None for a side without a basis."""

    rows: Tensor | None
    columns: Tensor | None


Eigenbasis = Callable[[Tensor, Tensor], Tensor]
"""A method from a second moment (groups, n, n) and the basis so far (groups, n, n) to the new basis."""

eigenbases: Registry[Eigenbasis] = Registry("eigenbasis")


def init_basis(matrix: Matrix, like: Tensor, memory: int = 0, preconditions: bool = False) -> Basis:
    """Return the axes themselves as bases, with the dtype and device of ``like`` and room for a memory.

    Args:
        matrix: The matrix.
        like: A tensor.
        memory: Numbers that a learned term remembers.
        preconditions: Whether steps are made by preconditioners.
    """
    sides, of_sides = [], []
    for n, turns in ((matrix.rows, matrix.turns_rows), (matrix.columns, matrix.turns_columns)):
        sides.append(init_side(matrix.groups, n, like) if turns else (like.new_zeros(0), like.new_zeros(0)))
        side = sides[-1][0]
        of_sides.append(init_preconditioner(side, matrix.groups, n) if preconditions else like.new_zeros(0))
    (rows, row_moment), (columns, column_moment) = sides
    return Basis(
        age=like.new_zeros(()),
        size=like.new_zeros(()),
        row_moment=row_moment,
        column_moment=column_moment,
        rows=rows,
        columns=columns,
        row_preconditioner=of_sides[0],
        column_preconditioner=of_sides[1],
        memory=like.new_zeros(memory),
    )


# ---------------------------------------------------------------------- second moments


def moments_of_factors(matrix: Matrix, factors: DecomposedGradient) -> Moments | None:
    """Return E[g g^T] and E[a a^T] over data points and positions, or None if the factors are not of this matrix."""
    if matrix.weight.role == "table":
        backprops = factors.backprops.flatten(0, 1)
        fits = backprops.shape[1] == matrix.columns
        return Moments(None, second_moment(backprops.unsqueeze(0))) if fits and len(backprops) else None
    rows = rows_of_factors(matrix, factors)
    if rows is None:
        return None
    a, g = rows
    return Moments(second_moment(g) if matrix.turns_rows else None, second_moment(a) if matrix.turns_columns else None)


def rows_of_factors(matrix: Matrix, factors: DecomposedGradient) -> tuple[Tensor, Tensor] | None:
    """Return activations (groups, r, i) and backprops (groups, r, o) of every row, None if they are not of this matrix.

    Where the matrix has the bias as a column, ``a`` ends in a 1.
    """
    activations, backprops = (factor.flatten(0, 1) for factor in factors)
    inputs = matrix.columns - (matrix.bias is not None)
    wanted = (matrix.groups * inputs, matrix.groups * matrix.rows)
    if (activations.shape[1], backprops.shape[1]) != wanted or not len(backprops):
        return None
    a, g = (each.unflatten(1, (matrix.groups, -1)).movedim(1, 0) for each in (activations, backprops))
    return (a if matrix.bias is None else torch.cat([a, torch.ones_like(a[..., :1])], dim=-1)), g


def moments_of_gradient(matrix: Matrix, gradient: Tensor) -> Moments:
    """Return the Gram matrices ``G G^T`` and ``G^T G`` of a gradient (groups, o, i)."""
    rows = second_moment(gradient.mT) if matrix.turns_rows else None
    return Moments(rows, second_moment(gradient) if matrix.turns_columns else None)


def follow(basis: Basis, moments: Moments, decay: Tensor | float) -> Basis:
    """Return the basis with its moving averages one step on; what is not finite is left out."""
    averages = [
        old if new is None else follow_moment(old, new, decay)
        for old, new in ((basis.row_moment, moments.rows), (basis.column_moment, moments.columns))
    ]
    return basis._replace(row_moment=averages[0], column_moment=averages[1])


# ---------------------------------------------------------------------- new bases


@eigenbases.register("eigh")
def decompose(moment: Tensor, basis: Tensor) -> Tensor:
    """Return the eigenvectors of a second moment, whatever the basis was."""
    return eigenvectors(moment)


@eigenbases.register("qr")
def iterate(moment: Tensor, basis: Tensor) -> Tensor:
    """Return the basis after one step of orthogonal iteration, the directions of most variance first.

    The shift by the mean eigenvalue's rounding error leaves directions without any variance where they are.

    Reference:
        Vyas et al. (2024), "SOAP", arXiv 2409.11321, algorithm 4.
    """
    image = moment @ basis
    order = (basis * image).sum(-2).argsort(dim=-1, descending=True).unsqueeze(-2).expand_as(basis)
    shift = torch.finfo(moment.dtype).eps
    return torch.linalg.qr((image + shift * basis).gather(-1, order))[0]


def renew(basis: Basis, second: Tensor, due: bool | Tensor, method: Eigenbasis) -> tuple[Basis, Tensor]:
    """Return the basis, made anew where that is due, and second moments (..., groups, o, i) turned into it.

    The second moment is taken for the variances of uncorrelated coordinates; of those of the new basis, which are
    mixtures of the old ones, the shares are the squared cosines between new and old directions.

    Args:
        basis: The bases so far.
        second: Moving averages of squared gradients in them.
        due: Whether they are made anew ().
        method: How, of sides of which all eigenvectors are kept.
    """
    turned, sides = second, []
    for axis, (moment, old) in enumerate(((basis.row_moment, basis.rows), (basis.column_moment, basis.columns))):
        if not old.numel():
            sides.append(old)
            continue
        new = method(moment, old) if is_square(old) else leading_basis(moment)
        turned = turn_squares(new, old, turned.mT).mT if axis == 0 else turn_squares(new, old, turned)
        sides.append(choose(due, new, old))
    return basis._replace(rows=sides[0], columns=sides[1]), choose(due, turned, second)


def into(basis: Basis, values: Tensor) -> Tensor:
    """Return a matrix (groups, o, i) in the coordinates of the bases."""
    values = turn_columns(basis.rows, values) if basis.rows.numel() else values
    return turn(basis.columns, values) if basis.columns.numel() else values


def out_of(basis: Basis, values: Tensor) -> Tensor:
    """Return a matrix (groups, o, i) given in the coordinates of the bases."""
    values = turn_columns_back(basis.rows, values) if basis.rows.numel() else values
    return turn_back(basis.columns, values) if basis.columns.numel() else values


def with_preconditioners(basis: Basis, roots: Tensor, floor: Tensor, epsilon: Tensor, correction: Tensor) -> Basis:
    """Return the basis with preconditioners that divide its coordinates by the roots of second moments, as factored.

    The factors are the means over rows and over columns, ``r_i c_j / m`` with the mean m over all.

    Args:
        basis: The bases.
        roots: Of the second moment of each coordinate (groups, o, i).
        floor: Added to each factor, as a share of its mean ().
        epsilon: Added to ``r`` ().
        correction: What the roots are to be divided by ().

    Reference:
        Shazeer and Stern (2018), "Adafactor", arXiv 1804.04235, for the factors; there they are of the second moments
        themselves.
    """
    rows, columns = roots.mean(-1) / correction, roots.mean(-2) / correction
    mean = rows.mean(-1, keepdim=True)
    of_rows = make_preconditioner(basis.rows, rows, floor * mean + epsilon)
    of_columns = make_preconditioner(basis.columns, columns / mean, floor)
    return basis._replace(row_preconditioner=of_rows, column_preconditioner=of_columns)


def preconditioned(basis: Basis, gradient: Tensor, largest: float = 0.0) -> Tensor:
    """Return a gradient (groups, o, i) between the preconditioners of its rows and columns.

    Args:
        basis: Its bases.
        gradient: The gradient.
        largest: Bound of elements, 0 for none.
    """
    step = precondition(basis.column_preconditioner, precondition_columns(basis.row_preconditioner, gradient))
    return step.clamp(-largest, largest) if largest else step
