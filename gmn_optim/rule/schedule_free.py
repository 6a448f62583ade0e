"""Adam in the Kronecker eigenbasis, its iterates averaged: a constant step size that needs no schedule."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gmn_optim.constants import constant
from gmn_optim.rule.basis import Basis
from gmn_optim.rule.coordinates import Coordinates
from gmn_optim.rule.features import root
from gmn_optim.rule.kronecker import KroneckerAdamTerm
from gmn_optim.rule.layout import Chunk, Layout
from gmn_optim.rule.look_schedule import FOLLOW_EVERY
from gmn_optim.rule.matrices import Matrix
from gmn_optim.rule.nominal import LEAST_SQUARE, Buffers, ChunkInputs, Surroundings, nominal_terms
from gmn_optim.rule.scalars import SPEED, Decay, LogScalar
from gmn_optim.rule.small_weights import LEAST_SIZE, are_small, first_sizes, relative_sizes
from gmn_optim.rule.small_weights import SHARPNESS as SMALL_SHARPNESS
from gmn_optim.rule.small_weights import STEP as SMALL_STEP

REFERENCE_WIDTH, REFERENCE_DEPTH = 64, 2
"""Inputs of a layer, and number of matrices in a model, at which the step size is what it says."""

LEAST_SHARE = 0.005
"""The average forgets at least so much at each step, so that it can follow when the data change late in a training."""

MISSED_BETA = 0.98
"""Beta is so large at least where factors miss the gradient: fits of differential equations reach losses at which what
is left of a whole step in the parameters is the largest error."""

FEWEST_INPUTS = 16
"""A layer of fewer inputs takes the steps of one that has so many."""

SIZES = (0.1, 2.0)
"""Bounds of the sizes that steps follow; where a weight tells nothing, they are ordinary."""


@nominal_terms.register("kronecker_schedule_free")
class KroneckerScheduleFreeTerm(KroneckerAdamTerm):
    """Primal averaging of steps that are Adam's, without momentum, in the Kronecker eigenbasis.

    A point z takes the steps; x averages the points that z went through, the newest ``1 / sharpness`` of the training
    so far weighing most; the parameters are ``y = (1 - beta) z + beta x``. Seen from y, the state is ``e = x - z``:
    ``e <- (1 - c) (e + u)`` and ``y <- y - (c beta (e + u) + (1 - beta) u)`` for a step u, with ``c = k / (t + k - 1)``
    at step t, 0.005 at least. That is a momentum whose memory grows with the training, so noise is averaged away at a
    constant step size, as by a schedule that ends at zero, but without the length of the training being known.

    The roots of a weight's second moments in the basis are taken for products of a number for each row and one for each
    column, and followed when the factors are read, unless these miss the gradient. Steps between two looks then cost
    one product for each side (:mod:`gmn_optim.rule.preconditioner`). Their elements may be bounded, so that a rare
    feature, such as a column that is nearly constant but for a few large values, leaves the others their steps: it may
    not have shown at the last look, and is divided by next to nothing.

    The steps of a matrix shrink with the root of its inputs and of the number of matrices, since more small steps add
    up at an output of a wide layer and of a deep model. They follow the size of its weights before the first step (root
    mean square, against the ``1 / sqrt(3 inputs)`` of torch's initialization). Networks most of whose weights are small
    by design, such as SIREN, keep the axes for bases and take other steps, see :mod:`gmn_optim.rule.small_weights`; no
    meta-training sees such a network, and what it makes of memories and damping is not for them.

    Reference:
        Defazio et al. (2024), "The road less scheduled", arXiv 2405.15682, equations 3 to 5; George et al. (2018),
        arXiv 1806.03884, for the basis.

    Example:
        >>> import torch
        >>> term = KroneckerScheduleFreeTerm()
        >>> e, v = torch.zeros(2), torch.zeros(2)
        >>> direction, (e, v) = term.direction(torch.ones(2), (e, v), torch.ones(()))
        >>> direction.tolist(), e.tolist()
        ([1.0, 1.0], [0.0, 0.0])
    """

    default_alpha = 0.012
    averages_gradients = False
    minds_small_weights = True
    averages_steps = True
    makes_preconditioners = True

    def __init__(self, refresh_every: int = 50, method: str = "eigh", follow_every: int = FOLLOW_EVERY) -> None:
        super().__init__(refresh_every, method, follow_every)
        del self.beta1
        self.beta2 = Decay(0.995)
        self.epsilon = LogScalar(1e-16)  # with Adam's 1e-8, a small loss would take smaller steps
        self.beta = Decay(0.8)
        self.sharpness = LogScalar(10.0)
        self.width_power, self.depth_power = (nn.Parameter(torch.tensor(-0.5 / SPEED)) for _ in range(2))
        self.size_power = nn.Parameter(torch.tensor(1.0 / SPEED))

    def direction(
        self, gradient: Tensor, buffers: Buffers, step: Tensor, momentum: Tensor | None = None
    ) -> tuple[Tensor, Buffers]:
        """Return the step of the parameters, and the new buffers e and v; ``momentum`` takes the place of beta."""
        normalized, second = self._normalize(gradient, buffers[1], step)
        beta = self.beta() if momentum is None else momentum
        direction, average = _average(normalized, buffers[0], _weights(step, beta, self.sharpness()))
        return direction, (average, second)

    def directions(
        self, chunks: Sequence[ChunkInputs], bases: tuple[Basis, ...], around: Surroundings
    ) -> tuple[list[tuple[Tensor, Buffers]], tuple[Basis, ...]]:
        """Return the steps of the parameters and new buffers, matrices in their bases, and the new bases."""
        bases, around = self._begin(bases, around)
        steps, bases = super().directions(chunks, bases, around)
        turns, results = around.turns, []
        sharpness = self.sharpness() if turns is None else around.once("sharpness", lambda: self.sharpness_of(turns))
        known: dict[tuple[int, bool], tuple[Tensor, Tensor, Tensor]] = {}
        for chunk, inputs, (step, (_, *seconds)) in zip(around.layout.chunks, chunks, steps, strict=True):
            key = chunk.clock, chunk.missed  # chunks of one clock have taken the same steps, with the same momentum
            if key not in known:
                known[key] = _weights(inputs.step, self._beta_of(chunk, inputs, around), sharpness)
            direction, average = _average(step, inputs.buffers[0], known[key])
            results.append((direction, (average, *seconds)))
        return results, bases

    def average_shares(self, layout: Layout, bases: tuple[Basis, ...]) -> list[Tensor]:
        """Return what the average weighs in the parameters of each chunk () without a momentum of its own."""
        turns = self.turns(layout.matrices, bases) if layout.matrices else None
        return [self._share(chunk, turns) for chunk in layout.chunks]

    def _beta_of(self, chunk: Chunk, inputs: ChunkInputs, around: Surroundings) -> Tensor:
        """Return the share of the average in the parameters of a chunk ()."""
        return self._share(chunk, around.turns) if inputs.momentum is None else inputs.momentum

    def _share(self, chunk: Chunk, turns: Tensor | None) -> Tensor:
        """Return the same where there is no momentum in its place ()."""
        beta = self.scalar("beta", turns)
        return beta.clamp_min(MISSED_BETA) if chunk.missed else beta

    def scalar(self, name: str, turns: Tensor | None) -> Tensor:
        """Return a scalar by name (), as it was before any meta-training where bases do not turn, see the class."""
        learned = getattr(self, name)
        return learned() if turns is None else torch.where(turns, learned(), learned.initial)

    def has_preconditioners(self, matrix: Matrix) -> bool:
        """Return whether it is a layer's weight; of a table few rows have a gradient."""
        return matrix.weight.role == "weight"

    def new_average(self, inputs: ChunkInputs) -> Tensor:
        """Return e as it is: it follows steps, not gradients."""
        return inputs.buffers[0]

    def _begin(self, bases: tuple[Basis, ...], around: Surroundings) -> tuple[tuple[Basis, ...], Surroundings]:
        """Return the bases with the weights' sizes before the first step, and whether bases turn."""
        matrices = around.layout.matrices
        if not matrices:
            return bases, around
        if around.refresh:  # at the first step every basis is due
            pairs = zip(matrices, bases, strict=True)
            bases = tuple(
                b._replace(size=torch.where((b.age == 0) & (b.size == 0), _weight_size(m, around), b.size))
                for m, b in pairs
            )
        return bases, around._replace(turns=around.once("turns", lambda: self.turns(matrices, bases)))

    def matrix_scales(self, turned: Sequence[Coordinates], around: Surroundings) -> Sequence[Tensor]:
        """Return what the steps of each matrix are multiplied by (), 1 at the reference, see the class."""
        if not turned:
            return []
        matrices, bases = zip(*((each.matrix, each.basis) for each in turned), strict=True)
        return [*around.once("scales", lambda: self.scales(matrices, bases, around.turns))]

    def turns(self, matrices: Sequence[Matrix], bases: Sequence[Basis]) -> Tensor:
        """Return whether bases turn (), by the sizes that weights had before the first step.

        Args:
            matrices: All matrices of the model.
            bases: Of each.
        """
        return ~are_small(first_sizes(matrices, [basis.size for basis in bases]))

    def sharpness_of(self, turns: Tensor) -> Tensor:
        """Return the sharpness of the average in a model whose bases turn, or do not ()."""
        return torch.where(turns, self.sharpness(), SMALL_SHARPNESS)

    def scales(self, matrices: Sequence[Matrix], bases: Sequence[Basis], turns: Tensor) -> tuple[Tensor, ...]:
        """Return what the steps of each matrix of a model are multiplied by (), see the class.

        Args:
            matrices: All matrices of the model.
            bases: Of each.
            turns: Whether they turn ().
        """
        # of a table only the row that is read acts on an output
        inputs = tuple(1 if matrix.weight.role == "table" else matrix.inputs for matrix in matrices)
        sizes = relative_sizes(torch.stack([basis.size for basis in bases]), inputs)
        logs = _log_widths(inputs, sizes.dtype, sizes.device)
        sizes = torch.where(sizes < LEAST_SIZE, torch.ones_like(sizes), sizes).clamp(*SIZES).log()
        depth = math.log(len(matrices) / REFERENCE_DEPTH)
        widths = logs * self.width_power
        exponents = widths + depth * self.depth_power + sizes * self.size_power
        of_small = SMALL_STEP * torch.exp(SPEED * widths).clamp_max(1.0)
        return torch.where(turns, torch.exp(SPEED * exponents), of_small).unbind()

    def _normalize(self, gradient: Tensor, second: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``g / (sqrt(v) + epsilon)`` and the new v, corrected for its start at zero."""
        beta2 = self.beta2()
        second = torch.lerp(gradient.square(), second, beta2)
        root = (second / (1 - torch.pow(beta2, step))).clamp_min(LEAST_SQUARE).sqrt()
        return gradient / (root + self.epsilon()), second


def _weights(number: Tensor, beta: Tensor, sharpness: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what e and u weigh in the step of the parameters, and what is kept of e, each ()."""
    share = (sharpness / (number + sharpness - 1)).clamp_min(LEAST_SHARE)
    now = share * beta
    return now, now + (1 - beta), 1 - share


def _average(step: Tensor, average: Tensor, weights: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the step of the parameters for a step u of z, ``c beta (e + u) + (1 - beta) u``, and the new e."""
    of_average, of_step, kept = weights
    return torch.addcmul(of_average * average, step, of_step), kept * (average + step)


def _weight_size(matrix: Matrix, around: Surroundings) -> Tensor:
    """Return the root mean square of a weight ()."""
    chunk = around.layout.chunks[matrix.place.chunk]
    start = sum(chunk.sizes[: matrix.place.segment])
    weight = around.parameters[matrix.place.chunk].narrow(0, start, matrix.weight.size)
    return root(weight.square().mean())


@constant()
def _log_widths(inputs: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return for each matrix the log of its inputs against the reference (n)."""
    logs = [math.log(max(n, FEWEST_INPUTS) / REFERENCE_WIDTH) for n in inputs]
    return torch.tensor(logs, dtype=dtype, device=device)
