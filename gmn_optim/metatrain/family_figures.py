"""Figures of a rule on several tasks: its curves against those of the nominal term alone and of tuned Adam."""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from gmn_optim.errors import InvalidArgumentError
from gmn_optim.metatrain.log import rounded

Curve = list[float]
"""Mean held-out loss over the seeds, at step 0 and after every ``every`` steps."""

Sweep = dict[float, Curve]
"""Curves by step size, or by multiplier of one."""


LEVELS = (0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
"""Shares of the way down from the start of a training, on a logarithmic scale, at which its speed is measured."""


class References(NamedTuple):
    """What a rule is measured against on a task.

    Attributes:
        nominal: Curves of the nominal term alone, by multiplier of its own step size; 1 is among them.
        adam: Curves of Adam, by step size.
    """

    nominal: Sweep
    adam: Sweep


class TaskFigures(NamedTuple):
    """A rule, at its own step size, on one task.

    Attributes:
        against_nominal: How many times fewer steps it needs than the nominal term at its best multiplier, see
            :func:`step_reduction`.
        untuned: The same against the nominal term at multiplier 1, so that neither is tuned.
        against_adam: The same against Adam at its best step size.
        speed: How many times fewer steps than the nominal term at its best multiplier on the whole way, see
            :func:`speed`.
        ratio: Its final loss over that of the nominal term at its best multiplier.
        multiplier: The best multiplier, whose curve has the lowest point.
        adam_lr: The best step size of Adam.
    """

    against_nominal: float
    untuned: float
    against_adam: float
    speed: float
    ratio: float
    multiplier: float
    adam_lr: float

    def to_dict(self) -> dict[str, float | None]:
        """Return the figures by name with six digits, None where not finite."""
        return dict(zip(self._fields, rounded(self), strict=True))


class FamilyEvaluation(NamedTuple):
    """A rule on several tasks; means are over the tasks that were measured.

    Attributes:
        curves: Of the rule, by task.
        references: By task.
        tasks: Figures by task.

    Example:
        >>> references = References({1.0: [4.0, 2.0, 1.0]}, {0.01: [4.0, 4.0, 0.5]})
        >>> found = compare({"a": [4.0, 1.0, 0.5]}, {"a": references}, every=10)
        >>> found.against_nominal, found.against_adam, found.worst_ratio
        (2.0, 1.0, 0.5)
    """

    curves: dict[str, Curve]
    references: dict[str, References]
    tasks: dict[str, TaskFigures]

    @property
    def against_nominal(self) -> float:
        """Return the geometric mean of the step reduction against the nominal term at its best step size."""
        return _geometric_mean(each.against_nominal for each in self.tasks.values())

    @property
    def untuned(self) -> float:
        """Return the geometric mean of the step reduction against the nominal term at its own step size."""
        return _geometric_mean(each.untuned for each in self.tasks.values())

    @property
    def against_adam(self) -> float:
        """Return the geometric mean of the step reduction against Adam at its best step size."""
        return _geometric_mean(each.against_adam for each in self.tasks.values())

    @property
    def speed(self) -> float:
        """Return the geometric mean of the speed against the nominal term at its best step size."""
        return _geometric_mean(each.speed for each in self.tasks.values())

    @property
    def worst_ratio(self) -> float:
        """Return the largest ratio of final losses against the nominal term."""
        return max(each.ratio for each in self.tasks.values())

    def to_dict(self) -> dict[str, Any]:
        """Return means and figures of the tasks as JSON values."""
        names = ("against_nominal", "untuned", "against_adam", "speed", "worst_ratio")
        means = dict(zip(names, rounded([getattr(self, name) for name in names]), strict=True))
        return {**means, "tasks": {name: figures.to_dict() for name, figures in self.tasks.items()}}


def compare(curves: Mapping[str, Curve], references: Mapping[str, References], every: int) -> FamilyEvaluation:
    """Return curves with their figures.

    Args:
        curves: Of the rule, by task.
        references: Of the same tasks at least.
        every: Steps between two points of a curve.

    Raises:
        InvalidArgumentError: no task, or a nominal sweep without multiplier 1.
    """
    if not curves:
        raise InvalidArgumentError("no task to compare on; name at least one")
    tasks = {name: _task_figures(curve, references[name], every) for name, curve in curves.items()}
    return FamilyEvaluation(dict(curves), {name: references[name] for name in curves}, tasks)


def best_of(sweep: Mapping[float, Curve]) -> float:
    """Return the key of the curve with the lowest point.

    Example:
        >>> best_of({0.1: [4.0, 3.0], 1.0: [4.0, 2.0, 5.0]})
        1.0
    """
    return min(sweep, key=lambda key: lowest(sweep[key]))


def step_reduction(curve: Curve, reference: Curve, every: int) -> float:
    """Return how many times fewer steps a curve needs than a reference curve to what both of them reach.

    That is the lowest point of the reference, or of the curve itself if it never gets there: then the number is
    below 1. Steps count as at least ``every``.

    Example:
        >>> step_reduction([4.0, 1.0, 0.5], [4.0, 2.0, 1.0], every=10)
        2.0
        >>> step_reduction([4.0, 3.0, 2.0], [4.0, 2.0, 1.0], every=10)
        0.5
    """
    target = max(lowest(curve), lowest(reference))
    return _steps_to(reference, target, every) / _steps_to(curve, target, every)


def speed(curve: Curve, reference: Curve, every: int) -> float:
    """Return how many times fewer steps a curve needs than a reference on the whole way to what both of them reach.

    That is the geometric mean over :data:`LEVELS`. Where a curve is flat, the step of its lowest point is a matter of
    luck, which :func:`step_reduction` hangs on.

    Example:
        >>> speed([4.0, 1.0, 0.5], [4.0, 2.0, 1.0], every=10) > 1.0
        True
        >>> speed([4.0, 2.0, 1.0], [4.0, 2.0, 1.0], every=10)
        1.0
    """
    start, end = min(curve[0], reference[0]), max(lowest(curve), lowest(reference))
    if not (0 < end < start < math.inf):
        return step_reduction(curve, reference, every)
    # the lowest of them must not be rounded below what is reached
    targets = [max(start * (end / start) ** share, end) for share in LEVELS]
    return _geometric_mean(max(crossing(reference, t), 1.0) / max(crossing(curve, t), 1.0) for t in targets)


def crossing(curve: Sequence[float], target: float) -> float:
    """Return the place along a curve where it first comes down to a target, between points by a straight line.

    Example:
        >>> crossing([2.0, 1.0, 0.5], target=0.75), crossing([2.0, 1.0], target=0.1)
        (1.5, inf)
    """
    for place, value in enumerate(curve):
        if value <= target:
            before = curve[place - 1] if place else value
            return place - (target - value) / (before - value) if before > value and math.isfinite(before) else place
    return math.inf


def lowest(curve: Curve) -> float:
    """Return the lowest point of a curve, infinity for one without any.

    Example:
        >>> lowest([4.0, math.nan, 2.0])
        2.0
    """
    return min((value for value in curve if not math.isnan(value)), default=math.inf)


def _task_figures(curve: Curve, references: References, every: int) -> TaskFigures:
    """Return the figures of one task."""
    if 1.0 not in references.nominal:
        raise InvalidArgumentError(f"multipliers {sorted(references.nominal)} lack 1, the nominal term's own step size")
    multiplier, adam_lr = best_of(references.nominal), best_of(references.adam)
    tuned = references.nominal[multiplier]
    return TaskFigures(
        against_nominal=step_reduction(curve, tuned, every),
        untuned=step_reduction(curve, references.nominal[1.0], every),
        against_adam=step_reduction(curve, references.adam[adam_lr], every),
        speed=speed(curve, tuned, every),
        ratio=_ratio(curve[-1], tuned[-1]),
        multiplier=multiplier,
        adam_lr=adam_lr,
    )


def _geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean of positive numbers."""
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


def _ratio(loss: float, reference: float) -> float:
    """Return the ratio of two losses, infinity if the first, or what is left of it beside zero, is not finite."""
    return loss / max(reference, sys.float_info.min) if math.isfinite(loss) else math.inf


def _steps_to(curve: Curve, target: float, every: int) -> int:
    """Return the steps after which a curve is at or below a target that it reaches, at least ``every``."""
    return max(next((number for number, value in enumerate(curve) if value <= target), len(curve)), 1) * every
