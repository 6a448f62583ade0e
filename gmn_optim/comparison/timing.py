"""The time of an arm's training step against Adam's, side by side in one process."""

import statistics

import torch

from gmn_optim.comparison.arms import Arm, Setting
from gmn_optim.comparison.record import Timing
from gmn_optim.comparison.training import TrainingLoop
from gmn_optim.tasks.base import AbstractTask

STEPS = 50
"""Steps of a round, a multiple of every optimizer's interval between two decompositions."""

WARM_UP = 10
"""Steps before the first round, in which models are traced and states made."""


def time_against_adam(
    task: AbstractTask,
    name: str,
    adam: tuple[Arm, Setting],
    other: tuple[Arm, Setting],
    *,
    rounds: int,
    seed: int,
    steps: int = STEPS,
) -> Timing:
    """Train Adam and an arm in turn, so that a drift of the machine meets both, and return the ratios of their times.

    A step is both passes and the update; drawing batches and measuring losses do not count. A training that diverges
    so far that a matrix cannot be decomposed gives no ratios.

    Args:
        task: The problem.
        name: Its name.
        adam: Adam and its setting.
        other: The arm and its setting.
        rounds: How many ratios.
        seed: Of initial parameters and batches.
        steps: Of a round.

    Example:
        >>> from gmn_optim.comparison.arms import arms
        >>> from gmn_optim.tasks.quadratic import QuadraticTask
        >>> pair = (arms["adam"], Setting(0.01)), (arms["sgd-momentum"], Setting(0.01))
        >>> found = time_against_adam(QuadraticTask(), "quadratic", *pair, rounds=2, seed=0, steps=3)
        >>> found.arm, len(found.ratios)
        ('sgd-momentum', 2)
    """
    total = WARM_UP + rounds * steps
    loops = [TrainingLoop(task, arm, setting, seed, total) for arm, setting in (adam, other)]
    try:
        for loop in loops:
            _seconds_per_step(loop, WARM_UP)
        pairs = [tuple(_seconds_per_step(loop, steps) for loop in loops) for _ in range(rounds)]
    except torch.linalg.LinAlgError:  # a training that diverges has no time to a target either
        return Timing(name, other[0].name, [], 0.0)
    ratios = [theirs / adams for adams, theirs in pairs]
    return Timing(name, other[0].name, ratios, statistics.median(theirs for _, theirs in pairs))


def _seconds_per_step(loop: TrainingLoop, steps: int) -> float:
    """Return the mean time of the next steps."""
    before = loop.seconds
    for _ in range(steps):
        loop.step()
    return (loop.seconds - before) / steps
