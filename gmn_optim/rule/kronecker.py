"""Adam in the eigenbasis of the Kronecker factors that each data point's gradient gives."""

import functools
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from gmn_optim.rule.basis import (
    Basis,
    eigenbases,
    init_basis,
    into,
    preconditioned,
    with_preconditioners,
)
from gmn_optim.rule.bounded_steps import bounded
from gmn_optim.rule.coordinates import Coordinates, TurnedRows, rows_of, turn_rows
from gmn_optim.rule.features import root
from gmn_optim.rule.followed_bases import FollowedBases
from gmn_optim.rule.layout import Layout
from gmn_optim.rule.look_schedule import FOLLOW_EVERY, NO_LOOK, Look, choose
from gmn_optim.rule.matrices import Matrix
from gmn_optim.rule.matrix_pieces import ChunkCorrections, Corrections, MatrixPieces
from gmn_optim.rule.nominal import (
    LEAST_SQUARE,
    AdamTerm,
    Buffers,
    ChangedStep,
    ChunkInputs,
    Surroundings,
    nominal_terms,
)
from gmn_optim.rule.scalars import Decay, LogScalar

MISSED_DECAY = 0.95
"""Squared gradients of layers whose factors miss the gradient are remembered for twenty steps. Such losses
hold derivatives of the model (PINNs) and fall by orders of magnitude, which a longer memory follows too late."""


@nominal_terms.register("kronecker_adam")
class KroneckerAdamTerm(FollowedBases, AdamTerm):
    """Adam in the basis in which the gradient of a matrix is least correlated; plain Adam on vectors.

    The basis of a layer's outputs are the eigenvectors of E[g g^T], that of its inputs those of E[a a^T] with a 1 for
    the bias, both over data points and positions. Where no factors explain the gradient they are those of its Gram
    matrices of earlier steps (the axes at the first): in its own singular vectors a gradient is nothing but a diagonal.
    This step's count for a thousandth there, which settles directions that earlier gradients leave open.

    The average of gradients stays in the parameter's own coordinates, the one of squared gradients in the basis: when
    the basis turns, each new direction takes its share of it by the squared cosines with the old directions.

    Args:
        refresh_every: Steps between two bases, see :class:`gmn_optim.rule.look_schedule.LookSchedule`.
        method: How a basis is made, ``eigh`` or ``qr``.
        follow_every: Steps between two looks at the factors.

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
    memory_per_matrix = 0
    """Numbers that it keeps of every matrix for a learned body."""
    serves_body = False
    """Whether a learned body changes its steps. One that asks for two more buffers finds in them an average of the
    noise that the rows of factors show in the basis, and its own gain."""

    largest_element = 0.0
    """Bound of the elements of steps that preconditioners make, 0 for none."""

    def __init__(self, refresh_every: int = 50, method: str = "eigh", follow_every: int = FOLLOW_EVERY) -> None:
        super().__init__()
        self.refresh_every, self.follow_every, self.method = refresh_every, follow_every, eigenbases[method]
        self.factor_decay = Decay(0.95)
        self.damping = LogScalar(1e-4)

    def serve_body(self, buffers: int = 2, memory: int = 0) -> None:
        """Keep buffers, and numbers of every matrix, for a learned body from now on."""
        if not self.serves_body:
            self.serves_body, self.buffers_per_parameter = True, self.buffers_per_parameter + buffers
            self.memory_per_matrix = memory

    def init_bases(self, layout: Layout, like: Tensor) -> tuple[Basis, ...]:
        """Return the axes as the bases of every matrix."""
        memory = self.memory_per_matrix
        return tuple(init_basis(each, like, memory, self.has_preconditioners(each)) for each in layout.matrices)

    def has_preconditioners(self, matrix: Matrix) -> bool:
        """Return whether the state holds preconditioners of a matrix."""
        return False

    def directions(
        self, chunks: Sequence[ChunkInputs], bases: tuple[Basis, ...], around: Surroundings
    ) -> tuple[list[tuple[Tensor, Buffers]], tuple[Basis, ...]]:
        """Return Adam's directions and buffers, those of matrices in their bases, and the new bases."""
        matrices, corrections = around.layout.matrices, self._corrections(chunks, around)
        faster = self._corrections(chunks, around, MISSED_DECAY) if any(m.weight.missed for m in matrices) else []
        pieces = MatrixPieces.cut(around.layout, chunks, [self.new_average(chunk) for chunk in chunks])
        self._step_vectors(around.layout, pieces, corrections)
        looks = self.looks([basis.age for basis in bases], around.age) if around.follow else [NO_LOOK] * len(matrices)
        seen = []
        for matrix, old, look in zip(matrices, bases, looks, strict=True):
            see = self._precondition if self._preconditions(matrix) else self._turn
            seen.append(see(matrix, old, look, faster if matrix.weight.missed else corrections, pieces, around))
        turned = bounded(seen)
        if pieces.of_body:
            turned = [self._turned(each, pieces, corrections, around) for each in turned]
        changed = self._changed(turned, pieces, around)
        for each, (step, factor, *_), scale in zip(turned, changed, self.matrix_scales(turned, around), strict=True):
            pieces.directions.put(each.matrix, each.turned_back(step), _product(each.bound, factor, scale))
        pairs = zip(turned, changed, strict=True)
        return pieces.joined(), tuple(each.basis._replace(memory=new.memory) for each, new in pairs)

    def _corrections(self, chunks: Sequence[ChunkInputs], around: Surroundings, most: float = 1.0) -> ChunkCorrections:
        """Return those of each chunk, the decay of the second moment being so much at most."""
        return ChunkCorrections(self, chunks, most, self.averages_gradients, around.turns)

    def new_average(self, inputs: ChunkInputs) -> Tensor:
        """Return the first buffer of a chunk after its average has followed the gradient."""
        beta1 = self.beta1() if inputs.momentum is None else inputs.momentum
        return torch.lerp(inputs.gradient, inputs.buffers[0], beta1)

    def matrix_scales(self, turned: Sequence[Coordinates], around: Surroundings) -> Sequence[Tensor | None]:
        """Return what the steps of each matrix are multiplied by, None for nothing."""
        return [None] * len(turned)

    def _step_vectors(self, layout: Layout, pieces: MatrixPieces, corrections: ChunkCorrections) -> None:
        """Put the directions and new buffers of what is in no matrix in their places: Adam's."""
        for number, parts in enumerate(layout.vectors):
            if not parts:
                continue
            chunk_corrections = corrections[number]
            gradient = pieces.gradients.of_parts(parts)
            second = torch.lerp(gradient.square(), pieces.seconds.of_parts(parts), chunk_corrections.beta2)
            root = (second / chunk_corrections.second).clamp_min(LEAST_SQUARE).sqrt() + chunk_corrections.epsilon
            numerator = gradient
            if self.averages_gradients:
                numerator = pieces.averages.of_parts(parts) / chunk_corrections.first
            pieces.seconds.put_parts(parts, second)
            pieces.directions.put_parts(parts, numerator / root)

    def _changed(
        self, turned: Sequence[Coordinates], pieces: MatrixPieces, around: Surroundings
    ) -> Sequence[ChangedStep]:
        """Return the steps of all matrices, as a learned term changes them, and its memories; keep its gains."""
        if around.change is None:
            return [ChangedStep(each.step, None, each.step, each.basis.memory) for each in turned]
        changed = around.change(turned, around.looks)
        if around.looks and pieces.of_body:
            for each, new in zip(turned, changed, strict=True):
                pieces.of_body[1].put(each.matrix, choose(each.look.follows, new.gain.expand_as(each.gain), each.gain))
        return changed

    def _preconditions(self, matrix: Matrix) -> bool:
        """Return whether preconditioners make the step; where factors miss the gradient it is followed at each step."""
        return self.has_preconditioners(matrix) and not matrix.weight.missed

    def _precondition(
        self,
        matrix: Matrix,
        old: Basis,
        look: Look,
        of_chunks: ChunkCorrections,
        pieces: MatrixPieces,
        around: Surroundings,
    ) -> Coordinates:
        """Return a matrix with the step of its preconditioners, which are made anew at a look."""
        gradient = pieces.gradients.of(matrix)
        basis = self.turn_basis(matrix, old, look, gradient, pieces, around)
        if around.follow:
            damping = root(self.scalar("damping", around.turns))
            basis = self._follow_squares(matrix, basis, look, gradient, pieces, of_chunks, damping)
        step = preconditioned(basis, gradient, self.largest_element)
        noise, rows = self._see_noise(matrix, basis, look, pieces, of_chunks, around)
        unturned = gradient, step, None, None, noise, rows, None, *_own_parts(matrix, pieces, around), look, False
        return Coordinates(matrix, basis, *unturned, age=around.age)

    def _turned(
        self, own: Coordinates, pieces: MatrixPieces, of_chunks: ChunkCorrections, around: Surroundings
    ) -> Coordinates:
        """Return the same for a body that reads coordinates in the bases."""
        if own.is_turned:
            return own
        corrections, step = of_chunks[own.matrix.place.chunk], own.step * own.bound
        squares = (pieces.seconds.of(own.matrix) / corrections.second).clamp_min(LEAST_SQUARE)
        return own._replace(
            gradient=into(own.basis, own.gradient),
            step=into(own.basis, step),
            squares=squares,
            floor=self._floor(squares, corrections, around),
            gain=pieces.of_body[1].of(own.matrix),
            own_step=step,
            bound=None,
            is_turned=True,
        )

    def _floor(self, squares: Tensor, corrections: Corrections, around: Surroundings) -> Tensor:
        """Return what is added to roots of squares ()."""
        return corrections.epsilon + self.scalar("damping", around.turns) * squares.mean().sqrt()

    def _follow_squares(
        self,
        matrix: Matrix,
        basis: Basis,
        look: Look,
        gradient: Tensor,
        pieces: MatrixPieces,
        of_chunks: ChunkCorrections,
        damping: Tensor,
    ) -> Basis:
        """Return the basis with the preconditioners of this look, and put the new second moments in their places."""
        corrections = of_chunks[matrix.place.chunk]
        decay = choose(look.follows, corrections.beta2**look.gap, 1.0)
        second = torch.lerp(into(basis, gradient).square(), pieces.seconds.of(matrix), decay)
        pieces.seconds.put(matrix, second)
        roots, correction = second.clamp_min(LEAST_SQUARE).sqrt(), corrections.second.sqrt()
        new = with_preconditioners(basis, roots, damping, corrections.epsilon, correction)
        pairs = zip(new, basis, strict=True)
        return Basis(*(fresh if fresh is kept else choose(look.follows, fresh, kept) for fresh, kept in pairs))

    def _turn(
        self,
        matrix: Matrix,
        old: Basis,
        look: Look,
        of_chunks: ChunkCorrections,
        pieces: MatrixPieces,
        around: Surroundings,
    ) -> Coordinates:
        """Return a matrix in its new bases, and put the new second moments in their places."""
        gradient = pieces.gradients.of(matrix)
        basis = self.turn_basis(matrix, old, look, gradient, pieces, around)
        turned, corrections = into(basis, gradient), of_chunks[matrix.place.chunk]
        second = torch.lerp(turned.square(), pieces.seconds.of(matrix), corrections.beta2)
        pieces.seconds.put(matrix, second)
        squares = (second / corrections.second).clamp_min(LEAST_SQUARE)
        floor = self._floor(squares, corrections, around)
        numerator = turned
        if self.averages_gradients:
            numerator = into(basis, pieces.averages.of(matrix)) / corrections.first
        step = numerator / (squares.sqrt() + floor)
        noise, rows = self._see_noise(matrix, basis, look, pieces, of_chunks, around)
        gain = pieces.of_body[1].of(matrix) if pieces.of_body else None
        seen = turned, step, squares, floor, noise, rows, gain, *_own_parts(matrix, pieces, around), look
        return Coordinates(matrix, basis, *seen, age=around.age)

    def _see_noise(
        self,
        matrix: Matrix,
        basis: Basis,
        look: Look,
        pieces: MatrixPieces,
        of_chunks: ChunkCorrections,
        around: Surroundings,
    ) -> tuple[Tensor | None, TurnedRows | None]:
        """Return the moving average of the noise (groups, o, i), put in its place, and the rows that show it.

        The average holds between two looks. It is corrected for its start at zero as it stands: a look that stands for
        n of t steps weighs ``(1 - beta2^n) / (1 - beta2^t)``.
        """
        if not (self.serves_body and around.looks):
            return None, None
        if not pieces.of_body:
            return None, rows_of(matrix, around.factors.get(matrix.weight.layer))
        rows = turn_rows(matrix, basis, around.factors.get(matrix.weight.layer))
        if rows is None:
            return None, None
        beta2 = of_chunks[matrix.place.chunk].beta2
        weight = (1 - beta2**look.gap) / (1 - beta2**basis.age)
        weight = choose(look.follows, weight.clamp_max(1.0), 0.0)
        noise = torch.lerp(pieces.of_body[0].of(matrix), rows.noise(), weight)
        pieces.of_body[0].put(matrix, noise)
        return noise.clamp_min(LEAST_SQUARE), rows


def _own_parts(matrix: Matrix, pieces: MatrixPieces, around: Surroundings) -> tuple[tuple[Tensor, ...], ...]:
    """Return gradient and average of a matrix in its own coordinates, which only a learned term looks at."""
    if around.change is None:
        return (), ()
    return pieces.gradients.parts_of(matrix), pieces.averages.parts_of(matrix)


def _product(*factors: Tensor | None) -> Tensor | None:
    """Return the product of those that are there, None if none is."""
    given = [factor for factor in factors if factor is not None]
    return functools.reduce(operator.mul, given) if given else None
