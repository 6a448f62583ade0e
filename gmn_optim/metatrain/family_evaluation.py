"""How a rule does on the tasks of a family: trainings from scratch, against its nominal term at the best step size."""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tqdm import tqdm

from gmn_optim.errors import InvalidArgumentError
from gmn_optim.metatrain.baselines import sweep_step_sizes
from gmn_optim.metatrain.evaluation import evaluate
from gmn_optim.metatrain.unroll import Meta, Unroll
from gmn_optim.rule import RuleConfig, UpdateRule
from gmn_optim.tasks.base import Split, tasks

MULTIPLIERS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Of the nominal term's own step size, in search of its best one."""

Curve = list[float]
"""Mean held-out loss over the seeds, at step 0 and after every ``every`` steps."""


class Protocol(NamedTuple):
    """How trainings are measured.

    Attributes:
        seeds: One per training.
        horizon: Most inner steps of a training; None for each task's own horizon.
        every: Steps between two measurements.
        split: Held-out set.

    Example:
        >>> Protocol(seeds=(1,), every=10).steps_of(20), Protocol(seeds=(1,), horizon=12, every=5).steps_of(20)
        (20, 10)
    """

    seeds: tuple[int, ...]
    horizon: int | None = None
    every: int = 50
    split: Split = "validation"

    def steps_of(self, task_horizon: int) -> int:
        """Return the steps of a training on a task: whole multiples of ``every``.

        Raises:
            InvalidArgumentError: not even one measurement fits.
        """
        most = task_horizon if self.horizon is None else min(task_horizon, self.horizon)
        if self.every < 1 or most < self.every:
            raise InvalidArgumentError(f"every = {self.every} must be at least 1, and at most the {most} steps")
        return most // self.every * self.every


class FamilyEvaluation(NamedTuple):
    """A rule on several tasks.

    Attributes:
        curves: Of the rule, by task.
        nominal: Of the nominal term alone, by task and multiplier of its step size.
        factors: By task, how many times fewer steps the rule needs than the reference, see :func:`step_reduction`.
        ratios: By task, final loss of the rule over that of the reference.
        factor: Geometric mean of ``factors``.
        worst_ratio: Largest of ``ratios``.
    """

    curves: dict[str, Curve]
    nominal: dict[str, dict[float, Curve]]
    factors: dict[str, float]
    ratios: dict[str, float]
    factor: float
    worst_ratio: float


def evaluate_family(
    names: Sequence[str],
    config: RuleConfig,
    meta: Meta,
    protocol: Protocol,
    *,
    multipliers: Sequence[float] = MULTIPLIERS,
    progress: bool = False,
) -> FamilyEvaluation:
    """Train from scratch on every task, by the rule and by its nominal term alone, and compare them.

    Args:
        names: Registered tasks.
        config: Of the rule.
        meta: Its meta-parameters.
        protocol: How trainings are measured.
        multipliers: Of the nominal term's step size; the reference is the one with the lowest curve.
        progress: Whether to show bars.

    Raises:
        UnknownNameError: no such task.

    Example:
        >>> config = RuleConfig(body=None, alpha=0.05)
        >>> meta = {name: value.detach() for name, value in UpdateRule(config).named_parameters()}
        >>> protocol = Protocol(seeds=(1, 2), every=5)
        >>> evaluate_family(["quadratic"], config, meta, protocol, multipliers=(1.0,)).factor
        1.0
    """
    curves, nominal = {}, {}
    for name in tqdm(names, desc="tasks", disable=not progress):
        nominal[name] = sweep_nominal(name, config, protocol, multipliers, progress)
        curves[name] = train_curve(name, config, meta, protocol, progress)
    return compare(curves, nominal, protocol.every)


def train_curve(name: str, config: RuleConfig, meta: Meta, protocol: Protocol, progress: bool = False) -> Curve:
    """Return the curve of a rule on a task."""
    unroll = Unroll(tasks[name](), UpdateRule(config))
    found = evaluate(
        unroll,
        meta,
        protocol.seeds,
        steps=protocol.steps_of(unroll.task.horizon),
        every=protocol.every,
        split=protocol.split,
        progress=progress,
    )
    return found.held_out.mean(1).tolist()


def sweep_nominal(
    name: str, config: RuleConfig, protocol: Protocol, multipliers: Sequence[float], progress: bool = False
) -> dict[float, Curve]:
    """Return the curves of a rule's nominal term alone on a task, by multiplier of its initial step size."""
    rule = UpdateRule(RuleConfig(nominal=config.nominal, body=None, alpha=config.alpha))
    unroll = Unroll(tasks[name](), rule)
    grid = [multiplier * rule.alpha.initial for multiplier in multipliers]
    steps = protocol.steps_of(unroll.task.horizon)
    found = sweep_step_sizes(unroll, grid, protocol.seeds, protocol.split, steps, protocol.every, progress)
    means = found.held_out.unflatten(1, (len(grid), -1)).mean(2)
    return dict(zip(multipliers, means.T.tolist(), strict=True))


def compare(curves: Mapping[str, Curve], nominal: Mapping[str, Mapping[float, Curve]], every: int) -> FamilyEvaluation:
    """Return curves with their summary; the reference of a task is the nominal curve with the lowest point.

    Example:
        >>> compare({"a": [4.0, 1.0, 0.5]}, {"a": {1.0: [4.0, 2.0, 1.0], 3.0: [4.0, 4.0, 4.0]}}, every=10)[-2:]
        (2.0, 0.5)
    """
    references = {name: min(nominal[name].values(), key=_lowest) for name in curves}
    factors = {name: step_reduction(curve, references[name], every) for name, curve in curves.items()}
    ratios = {name: _ratio(curve[-1], references[name][-1]) for name, curve in curves.items()}
    mean = math.exp(sum(map(math.log, factors.values())) / len(factors))
    copied = {name: dict(nominal[name]) for name in curves}
    return FamilyEvaluation(dict(curves), copied, factors, ratios, mean, max(ratios.values()))


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
    target = max(_lowest(curve), _lowest(reference))
    return _steps_to(reference, target, every) / _steps_to(curve, target, every)


def _ratio(loss: float, reference: float) -> float:
    """Return the ratio of two losses, infinity if the first, or what is left of it beside zero, is not finite."""
    return loss / max(reference, sys.float_info.min) if math.isfinite(loss) else math.inf


def _lowest(curve: Curve) -> float:
    """Return the lowest point of a curve, infinity for one without any."""
    return min((value for value in curve if not math.isnan(value)), default=math.inf)


def _steps_to(curve: Curve, target: float, every: int) -> int:
    """Return the steps after which a curve is at or below a target that it reaches, at least ``every``."""
    return max(next((number for number, value in enumerate(curve) if value <= target), len(curve)), 1) * every
