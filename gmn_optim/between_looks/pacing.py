"""How far a step between two looks goes: what the rule makes of lengths and cosines, in numbers of the host.

The same arithmetic stands in :mod:`gmn_optim.rule` for tensors, which trainings side by side and devices need; tests
hold the two together.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from gmn_optim.rule.bounded_steps import LARGEST_SIZE
from gmn_optim.rule.controller import ALIGNMENT_WEIGHT, Controller
from gmn_optim.rule.falling_bound import (
    COSINE_SCALE,
    FREE_CONCENTRATION,
    FREE_EPOCHS,
    LEAST_AT_ALL,
    LEAST_BOUND,
    MOST_WEIGHT,
    SHORTEST_ANNEALING,
    FallingBound,
    annealing_rate,
)
from gmn_optim.rule.features import TINY
from gmn_optim.rule.matrices import Matrix
from gmn_optim.rule.scalars import SPEED
from gmn_optim.rule.schedule_free import LEAST_SHARE


class Lengths(NamedTuple):
    """What is measured of a matrix before its step.

    Attributes:
        step: Length of the step that preconditioners make.
        gradient: Length of the gradient.
        average: Length of the nominal term's average.
        parameters: Length of the parameters.
        product: Inner product of gradient and average.

    Example:
        >>> Lengths(1.0, 2.0, 0.5, 3.0, -1.0).cosine
        -1.0
    """

    step: float
    gradient: float
    average: float
    parameters: float
    product: float

    @property
    def is_ordinary(self) -> bool:
        """Return whether all is finite, and far from where squares of float32 vanish; zero is ordinary."""
        vanish = (0.0 < length < TINY for length in (self.gradient, self.average))
        return all(map(math.isfinite, self)) and not any(vanish)

    @property
    def cosine(self) -> float:
        """Return the cosine of gradient and average, 0 where either is zero."""
        lengths = self.gradient * self.average
        return self.product / lengths if lengths else 0.0


class AveragingWeights(NamedTuple):
    """What average e and step u weigh in the step of the parameters, and what is kept of ``e + u``.

    Reference:
        :class:`gmn_optim.rule.schedule_free.KroneckerScheduleFreeTerm`.

    Example:
        >>> AveragingWeights.at(1.0, beta=0.8, sharpness=10.0)
        AveragingWeights(of_average=0.8, of_step=1.0, kept=0.0)
    """

    of_average: float
    of_step: float
    kept: float

    @classmethod
    def at(cls, step: float, beta: float, sharpness: float) -> "AveragingWeights":
        """Return the weights at a step, 1 at the first."""
        share = max(sharpness / (step + sharpness - 1), LEAST_SHARE)
        return cls(share * beta, share * beta + (1 - beta), 1 - share)


def follow_cosine(cosine: float, lengths: Lengths, age: int) -> float:
    """Return the moving average of the cosine after the ``age``-th step.

    Example:
        >>> follow_cosine(0.0, Lengths(1.0, 2.0, 0.5, 3.0, -1.0), age=100)
        -0.2
    """
    weight = max(1 / max(age - 1, 1), ALIGNMENT_WEIGHT)
    followed = cosine + weight * (lengths.cosine - cosine)
    return followed if math.isfinite(followed) else 0.0


def held_gains(
    body: Controller, memories: Sequence[Sequence[float]], age: int, matrices: Sequence[Matrix]
) -> list[float]:
    """Return the gains that a controller holds between two looks.

    Args:
        body: The controller.
        memories: Of the matrices that it serves, see its class; with the cosines of this step.
        age: Which step of the bases this is.
        matrices: All matrices of the model.

    Example:
        >>> body = Controller(width=8, gradmetanet=None, data_points=32)  # its largest pace is 0.8
        >>> [round(gain, 3) for gain in held_gains(body, [[0.1, *[0.0] * 4], [2.0, *[0.0] * 4]], 12, ())]
        [0.105, 1.226]
    """
    if not memories:
        return []
    bound, first_pace = body.bound.largest_pace, SPEED * body.first_pace.item()
    if body.bound.falls:
        bound = _falling_bound(body.bound, memories, age, annealing_rate(matrices))
    return [math.expm1(body.share * min(first_pace + memory[0], bound)) for memory in memories]


def _falling_bound(bound: FallingBound, memories: Sequence[Sequence[float]], age: int, rate: float) -> float:
    """Return the bound of the pace, see :meth:`gmn_optim.rule.falling_bound.FallingBound.at`."""
    _, cosines, _, concentrations, repetitions = zip(*(memory[:5] for memory in memories), strict=True)
    agreement = min(max(COSINE_SCALE * sum(cosines) / len(cosines), 0.0), 1.0)
    share = max(repetitions) if bound.epochs else 0.0
    again = age * share / bound.epochs * max(1 - share, 0.0) if bound.epochs else 0.0
    times = max(age * rate / bound.annealing if bound.annealing else 0.0, min(again, age / SHORTEST_ANNEALING))
    memorized = bound.concentration * max(min(concentrations) - FREE_CONCENTRATION, 0.0)
    usual = max(bound.largest_pace - (memorized + math.log1p(times)) * (1 - agreement), LEAST_BOUND)
    weight = min(max(age * share - FREE_EPOCHS, 0.0), MOST_WEIGHT)
    return max(usual - memorized * weight, LEAST_AT_ALL)


def bound_of(size: float) -> float:
    """Return what a step of this root mean square is multiplied by, so that it is no larger than allowed.

    Example:
        >>> bound_of(3.0), bound_of(0.1)
        (0.5, 1.0)
    """
    return LARGEST_SIZE / max(size, LARGEST_SIZE)
