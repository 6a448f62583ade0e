"""How a rule does on the tasks of a family: trainings from scratch, its nominal term alone, tuned Adam."""

from collections.abc import Sequence
from typing import NamedTuple

from tqdm import tqdm

from gmn_optim.errors import InvalidArgumentError
from gmn_optim.metatrain.baselines import sweep_step_sizes
from gmn_optim.metatrain.evaluation import evaluate
from gmn_optim.metatrain.family_figures import Curve, FamilyEvaluation, References, Sweep, compare
from gmn_optim.metatrain.unroll import Meta, Unroll
from gmn_optim.rule import RuleConfig, UpdateRule
from gmn_optim.tasks.base import Split, tasks

MULTIPLIERS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Of the nominal term's own step size, in search of its best one."""

TUNED_ADAM_LRS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016)
"""Step sizes of Adam, in search of its best one."""


class Protocol(NamedTuple):
    """How trainings are measured.

    Attributes:
        seeds: One per training.
        horizon: Most inner steps of a training; None for each task's own horizon.
        every: Steps between two measurements.
        split: Held-out set.
        averages: Whether the averages of parameters are measured, see :meth:`gmn_optim.GMNOptimizer.eval`.

    Example:
        >>> Protocol(seeds=(1,), every=10).steps_of(20), Protocol(seeds=(1,), horizon=12, every=5).steps_of(20)
        (20, 10)
    """

    seeds: tuple[int, ...]
    horizon: int | None = None
    every: int = 50
    split: Split = "validation"
    averages: bool = False

    def steps_of(self, task_horizon: int) -> int:
        """Return the steps of a training on a task: whole multiples of ``every``.

        Raises:
            InvalidArgumentError: not even one measurement fits.
        """
        most = task_horizon if self.horizon is None else min(task_horizon, self.horizon)
        if self.every < 1 or most < self.every:
            raise InvalidArgumentError(f"every = {self.every} must be at least 1, and at most the {most} steps")
        return most // self.every * self.every


def evaluate_family(
    names: Sequence[str],
    config: RuleConfig,
    meta: Meta,
    protocol: Protocol,
    *,
    multipliers: Sequence[float] = MULTIPLIERS,
    progress: bool = False,
) -> FamilyEvaluation:
    """Train from scratch on every task, by the rule, its nominal term alone and Adam, and compare them.

    Args:
        names: Registered tasks.
        config: Of the rule.
        meta: Its meta-parameters.
        protocol: How trainings are measured.
        multipliers: Of the nominal term's step size; 1 must be among them.
        progress: Whether to show bars.

    Raises:
        UnknownNameError: no such task.
        InvalidArgumentError: no task at all, or 1 is not among the multipliers.

    Example:
        >>> config = RuleConfig(body=None, alpha=0.05)
        >>> meta = {name: value.detach() for name, value in UpdateRule(config).named_parameters()}
        >>> protocol = Protocol(seeds=(1, 2), every=5)
        >>> evaluate_family(["quadratic"], config, meta, protocol, multipliers=(1.0,)).against_nominal
        1.0
    """
    curves, references = {}, {}
    for name in tqdm(names, desc="tasks", disable=not progress):
        nominal = sweep_nominal(name, config, protocol, multipliers, progress)
        references[name] = References(nominal, sweep_adam(name, protocol, progress))
        curves[name] = train_curve(name, config, meta, protocol, progress)
    return compare(curves, references, protocol.every)


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
        averages=protocol.averages,
        progress=progress,
    )
    return found.held_out.mean(1).tolist()


def sweep_nominal(
    name: str, config: RuleConfig, protocol: Protocol, multipliers: Sequence[float], progress: bool = False
) -> Sweep:
    """Return the curves of a rule's nominal term alone on a task, by multiplier of its initial step size."""
    kept = {name: getattr(config, name) for name in ("nominal", "alpha", "follow_every", "largest_element")}
    rule = UpdateRule(RuleConfig(body=None, **kept))
    grid = [multiplier * rule.alpha.initial for multiplier in multipliers]
    return dict(zip(multipliers, _sweep(name, rule, grid, protocol, progress), strict=True))


def sweep_adam(name: str, protocol: Protocol, progress: bool = False) -> Sweep:
    """Return the curves of Adam alone on a task, by step size.

    Example:
        >>> sorted(sweep_adam("quadratic", Protocol(seeds=(1,), every=10)))[:2]
        [0.0005, 0.001]
    """
    rule = UpdateRule(RuleConfig(nominal="adam", body=None))
    return dict(zip(TUNED_ADAM_LRS, _sweep(name, rule, TUNED_ADAM_LRS, protocol, progress), strict=True))


def _sweep(name: str, rule: UpdateRule, grid: Sequence[float], protocol: Protocol, progress: bool) -> list[Curve]:
    """Return the curve of a nominal term alone at every step size."""
    unroll = Unroll(tasks[name](), rule)
    steps = protocol.steps_of(unroll.task.horizon)
    how = protocol.seeds, protocol.split, steps, protocol.every, protocol.averages, progress
    found = sweep_step_sizes(unroll, grid, *how)
    return found.held_out.unflatten(1, (len(grid), -1)).mean(2).T.tolist()
