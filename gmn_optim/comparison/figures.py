"""The figures of a comparison, computed from its record alone."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from gmn_optim.comparison.arms import Setting
from gmn_optim.comparison.record import Record, Training
from gmn_optim.comparison.tuning import Score, best_setting, is_at_edge
from gmn_optim.metatrain.evaluation import Curves
from gmn_optim.metatrain.family_figures import crossing

STRONG_ARMS = ("adamw-cosine", "muon", "soap", "kfac")
"""Whose best is the rival of every arm in the overall table, unless others are named."""

MANY_PARAMETERS = 100_000
"""Tasks with more have a time of their own in the overall table: those of tiny networks are of no account."""


@dataclass(frozen=True)
class ArmFigures:
    """What an arm reached on a task, on the test set.

    Attributes:
        setting: The best on the validation set.
        grid: Step sizes that were tried.
        extended: Whether the grid was extended because the best lay at its edge.
        at_edge: Whether the best is still at the edge of what was tried.
        curves: Test curves, one column for each seed.
        best_loss: Lowest point of the mean curve.
        final_loss: Last point of the mean curve.
        final_std: Standard deviation of the last points over seeds; not a number for one seed.
        steps_to_target: Steps after which the mean curve is at or below the target, or infinity.
        steps_to_target_each: The same of each seed.
        factor: Tuned Adam's steps over these; 0 where the target is not reached.
        step_time: Median time of a step as a multiple of Adam's; not a number where it was not timed.
        stopped: Trainings on the test set that ended early.
    """

    setting: Setting
    grid: tuple[float, ...]
    extended: bool
    at_edge: bool
    curves: Curves
    best_loss: float
    final_loss: float
    final_std: float
    steps_to_target: float
    steps_to_target_each: tuple[float, ...]
    factor: float
    step_time: float
    stopped: int

    @property
    def time_factor(self) -> float:
        """Tuned Adam's time to the target over this arm's; 0 where the target is not reached."""
        return self.factor / self.step_time if self.factor else 0.0


@dataclass(frozen=True)
class TaskFigures:
    """What all arms reached on a task.

    Attributes:
        target: Lowest point of tuned Adam's mean test curve.
        adam_steps: The step at which it is reached; 1 if the start was never improved upon.
        steps: Length of a training.
        arms: Figures by name, tuned Adam first.
        parameters: How many numbers the network learns; 0 where nothing was timed.
    """

    target: float
    adam_steps: int
    steps: int
    arms: dict[str, ArmFigures]
    parameters: int = 0


@dataclass(frozen=True)
class OverallFigures:
    """One arm over all tasks.

    Attributes:
        tasks: On how many it ran.
        reached: On how many of them it reached the target.
        factor: Geometric mean of its factors; where a target is not reached, the factor that it has at most.
        time_factor: The same for time.
        many_time_factor: The same for time on tasks of more than 100,000 parameters; not a number without one.
        many_missed: On how many of these it did not reach the target.
        against_strong: Geometric mean of its factor over that of the best other rival.
        worst_final: Largest ratio of its final loss to tuned Adam's.
    """

    tasks: int
    reached: int
    factor: float
    time_factor: float
    many_time_factor: float
    many_missed: int
    against_strong: float
    worst_final: float


def task_figures(record: Record, task: str, arms: Iterable[str] | None = None) -> TaskFigures | None:
    """Return the figures of a task, or None as long as Adam has no trainings on the test set.

    Args:
        record: All trainings.
        task: Name of the task.
        arms: Names of the arms; None for all that have trainings on the test set.

    Example:
        >>> from gmn_optim.comparison.training import Measurements
        >>> record = Record(None)
        >>> found = Measurements([2.0, 1.0, 1.5], [math.nan, 2.0, 1.0], seconds=0.1)
        >>> record.add(Training("any", "adam", Setting(0.1), 0, "test", 10, False, found))
        >>> figures = task_figures(record, "any")
        >>> figures.target, figures.adam_steps, figures.arms["adam"].final_loss
        (1.0, 10, 1.5)
    """
    known = [each.arm for each in record.trainings.values() if each.task == task and each.split == "test"]
    chosen = [name for name in dict.fromkeys(["adam", *(known if arms is None else arms)]) if name in known]
    if "adam" not in chosen:
        return None
    adam = mean_curve(_chosen_trainings(record, task, "adam"))
    every = _chosen_trainings(record, task, "adam")[0].every
    target, adam_steps = min(adam), max(1, adam.index(min(adam)) * every)
    figures = {name: _arm_figures(record, task, name, target, adam_steps) for name in chosen}
    parameters = max((each.parameters for each in record.timings.values() if each.task == task), default=0)
    return TaskFigures(target, adam_steps, (len(adam) - 1) * every, figures, parameters)


def overall_figures(tasks: Sequence[TaskFigures], rivals: Sequence[str] = STRONG_ARMS) -> dict[str, OverallFigures]:
    """Return by name every arm's figures over the tasks that it ran on.

    Args:
        tasks: Figures of the tasks.
        rivals: Names of the arms whose best every arm is compared with.

    Example:
        >>> from gmn_optim.comparison.training import Measurements
        >>> record = Record(None)
        >>> found = Measurements([2.0, 1.0, 1.5], [math.nan, 2.0, 1.0], seconds=0.1)
        >>> record.add(Training("any", "adam", Setting(0.1), 0, "test", 10, False, found))
        >>> overall_figures([task_figures(record, "any")])["adam"].factor
        1.0
    """
    names = dict.fromkeys(name for task in tasks for name in task.arms)
    return {name: _overall(name, [task for task in tasks if name in task.arms], rivals) for name in names}


def validation_scores(trainings: Iterable[Training], target: float | None = None) -> dict[Setting, Score]:
    """Return what settings are chosen by: the steps to a target, then the lowest loss, of the mean validation curve.

    Args:
        trainings: Those of tuning.
        target: What is to be reached, or None if only the loss counts: for Adam, whose lowest loss is the target.

    Example:
        >>> from gmn_optim.comparison.training import Measurements
        >>> record = Record(None)
        >>> found = Measurements([2.0, 1.0, 1.5], [math.nan, 2.0, 1.0], seconds=0.1)
        >>> record.add(Training("any", "adam", Setting(0.1), 0, "validation", 10, False, found))
        >>> validation_scores(record.trainings.values(), target=1.5)
        {Setting(lr=0.1, options=()): (5.0, 1.0)}
    """
    groups: dict[Setting, list[Training]] = {}
    for each in trainings:
        groups.setdefault(each.setting, []).append(each)
    curves = {setting: mean_curve(group) for setting, group in groups.items()}
    every = {setting: group[0].every for setting, group in groups.items()}
    return {s: (0.0 if target is None else crossing(c, target) * every[s], min(c)) for s, c in curves.items()}


def validation_target(record: Record, task: str) -> float | None:
    """Return the lowest point of Adam's mean validation curves, None before Adam was tuned."""
    scores = validation_scores(record.of(task, "adam", "validation"))
    return min((loss for _, loss in scores.values()), default=None)


def mean_curve(trainings: Sequence[Training]) -> list[float]:
    """Return the mean held-out loss over trainings, point by point.

    Example:
        >>> from gmn_optim.comparison.training import Measurements
        >>> record = Record(None)
        >>> found = Measurements([2.0, 1.0, 1.5], [math.nan, 2.0, 1.0], seconds=0.1)
        >>> record.add(Training("any", "adam", Setting(0.1), 0, "test", 10, False, found))
        >>> mean_curve(record.of("any", "adam", "test"))
        [2.0, 1.0, 1.5]
    """
    return [
        statistics.fmean(values) for values in zip(*(each.measurements.held_out for each in trainings), strict=True)
    ]


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean, not a number of none.

    Example:
        >>> round(geometric_mean([1.0, 4.0]), 6)
        2.0
    """
    logs = [math.log(value) for value in values]
    return math.exp(statistics.fmean(logs)) if logs else math.nan


def factor_at_most(task: TaskFigures, name: str) -> float:
    """Return an arm's factor or, where it does not reach the target, Adam's steps over the whole training's.

    Example:
        >>> from gmn_optim.comparison.training import Measurements
        >>> record = Record(None)
        >>> found = Measurements([2.0, 1.0, 1.5], [math.nan, 2.0, 1.0], seconds=0.1)
        >>> record.add(Training("any", "adam", Setting(0.1), 0, "test", 10, False, found))
        >>> factor_at_most(task_figures(record, "any"), "adam")
        1.0
    """
    return task.arms[name].factor or task.adam_steps / task.steps


def _chosen_trainings(record: Record, task: str, arm: str) -> list[Training]:
    """Return the trainings on the test set at the setting that is best on the validation set."""
    target = None if arm == "adam" else validation_target(record, task)
    tests, scores = record.of(task, arm, "test"), validation_scores(record.of(task, arm, "validation"), target)
    worst = (math.inf, math.inf)
    tested = {setting: scores.get(setting, worst) for setting in dict.fromkeys(each.setting for each in tests)}
    return [each for each in tests if each.setting == best_setting(tested)]


def _arm_figures(record: Record, task: str, arm: str, target: float, adam_steps: int) -> ArmFigures:
    """Return an arm's figures on a task."""
    trainings, tuning = _chosen_trainings(record, task, arm), record.of(task, arm, "validation")
    curves, setting, tried = (
        _curves(trainings),
        trainings[0].setting,
        list(dict.fromkeys(each.setting for each in tuning)),
    )
    steps, final = curves.steps_to(target).item(), curves.held_out[-1].tolist()
    timing = record.timings.get((task, arm))
    return ArmFigures(
        setting=setting,
        grid=tuple(sorted({each.lr for each in tried} or {setting.lr})),
        extended=any(each.extended for each in tuning),
        at_edge=is_at_edge(setting, tried) if tried else False,
        curves=curves,
        best_loss=curves.held_out.mean(1).min().item(),
        final_loss=statistics.fmean(final),
        final_std=statistics.stdev(final) if len(final) > 1 and all(map(math.isfinite, final)) else math.nan,
        steps_to_target=steps,
        steps_to_target_each=tuple(curves.steps_to_each(target).tolist()),
        factor=_factor(adam_steps, steps),
        step_time=1.0 if arm == "adam" else statistics.median(timing.ratios) if timing and timing.ratios else math.nan,
        stopped=sum(bool(each.measurements.stopped) for each in trainings),
    )


def _factor(adam_steps: int, steps: float) -> float:
    """Return Adam's steps over an arm's; a target that is met before the first step counts as one step."""
    return adam_steps / max(steps, 1.0) if math.isfinite(steps) else 0.0


def _curves(trainings: Sequence[Training]) -> Curves:
    """Return trainings of equal length as columns."""
    held_out = torch.tensor([each.measurements.held_out for each in trainings], dtype=torch.float64).T
    training = torch.tensor([each.measurements.training for each in trainings], dtype=torch.float64).T
    return Curves(torch.arange(len(held_out)) * trainings[0].every, held_out, training)


def _overall(name: str, tasks: Sequence[TaskFigures], rivals: Sequence[str]) -> OverallFigures:
    """Return one arm's figures over tasks."""
    own = [task.arms[name] for task in tasks]
    factors = [factor_at_most(task, name) for task in tasks]
    times = [factor / arm.step_time for factor, arm in zip(factors, own, strict=True)]
    of_rivals = [
        [factor_at_most(task, each) for each in rivals if each in task.arms and each != name] for task in tasks
    ]
    against = [factor / max(of_task) for factor, of_task in zip(factors, of_rivals, strict=True) if of_task]
    are_many = [task.parameters > MANY_PARAMETERS for task in tasks]
    of_many = [time for time, is_one in zip(times, are_many, strict=True) if is_one]
    return OverallFigures(
        tasks=len(tasks),
        reached=sum(arm.factor > 0 for arm in own),
        factor=geometric_mean(factors),
        time_factor=geometric_mean(times),
        many_time_factor=geometric_mean(of_many),
        many_missed=sum(is_one and not arm.factor for arm, is_one in zip(own, are_many, strict=True)),
        against_strong=geometric_mean(against),
        worst_final=max(arm.final_loss / task.arms["adam"].final_loss for arm, task in zip(own, tasks, strict=True)),
    )
