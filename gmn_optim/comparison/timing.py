"""The time of an arm's training step against Adam's, side by side in one process."""

import statistics

import torch

from gmn_optim.comparison.arms import Arm, Setting
from gmn_optim.comparison.record import Timing
from gmn_optim.comparison.training import TrainingLoop
from gmn_optim.tasks.base import AbstractTask

BLOCK = 10
"""Steps that one of both takes before it is the other's turn."""

MOST_STEPS = 200
"""Steps of a round at most: by then every optimizer repeats what it does."""

WARM_UP = 2
"""Steps of a training that is thrown away, in which the process imports what it needs."""


def time_against_adam(
    task: AbstractTask,
    name: str,
    adam: tuple[Arm, Setting],
    other: tuple[Arm, Setting],
    *,
    rounds: int,
    seed: int,
    steps: int = MOST_STEPS,
) -> Timing:
    """Train Adam and an arm from the start in turn, so that a drift of the machine meets both; return ratios of times.

    A step is both passes and the update; drawing batches and measuring losses do not count. The first steps count,
    which cost more than later ones where an optimizer makes its state, or decomposes more often. A training that
    diverges so far that a matrix cannot be decomposed gives no ratios.

    Args:
        task: The problem.
        name: Its name.
        adam: Adam and its setting.
        other: The arm and its setting.
        rounds: How many ratios.
        seed: Of initial parameters and batches in the first round; each round has one of its own.
        steps: Of a round: those that the arm needs to its target.

    Example:
        >>> from gmn_optim.comparison.arms import arms
        >>> from gmn_optim.tasks.quadratic import QuadraticTask
        >>> pair = (arms["adam"], Setting(0.01)), (arms["sgd-momentum"], Setting(0.01))
        >>> found = time_against_adam(QuadraticTask(), "quadratic", *pair, rounds=2, seed=0, steps=3)
        >>> found.arm, found.steps, len(found.ratios)
        ('sgd-momentum', 3, 2)
    """
    parameters = sum(parameter.numel() for parameter in task.module.parameters())
    try:
        _seconds_of_round(task, (adam, other), seed, min(WARM_UP, steps))
        pairs = [_seconds_of_round(task, (adam, other), seed + number, steps) for number in range(rounds)]
    except torch.linalg.LinAlgError:  # a training that diverges has no time to a target either
        return Timing(name, other[0].name, [], 0.0, steps, parameters)
    ratios = [theirs / adams for adams, theirs in pairs]
    seconds = statistics.median(theirs for _, theirs in pairs) / steps
    return Timing(name, other[0].name, ratios, seconds, steps, parameters)


def _seconds_of_round(task: AbstractTask, both: tuple[tuple[Arm, Setting], ...], seed: int, steps: int) -> list[float]:
    """Return the seconds that either takes for its first steps."""
    loops = [TrainingLoop(task, arm, setting, seed, steps) for arm, setting in both]
    for begin in range(0, steps, BLOCK):
        for loop in loops:
            for _ in range(min(BLOCK, steps - begin)):
                loop.step()
    return [loop.seconds for loop in loops]
