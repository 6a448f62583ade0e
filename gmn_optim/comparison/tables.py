"""A comparison as Markdown tables and as JSON values."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from gmn_optim.comparison.arms import arms
from gmn_optim.comparison.figures import ArmFigures, OverallFigures, TaskFigures, factor_at_most
from gmn_optim.report import format_table


def task_table(task: TaskFigures) -> str:
    """Return a row for each arm on a task.

    Example:
        >>> from gmn_optim.comparison import Protocol, compare
        >>> short = Protocol(seeds=1, tuning_seeds=1, steps=20, every=10, rounds=0)
        >>> figures = compare("quadratic", ["sgd-momentum"], protocol=short)
        >>> task_table(figures.tasks["quadratic"]).splitlines()[0].split(" | ")[-3:]
        ['fewer steps', 'step time', 'less time']
    """
    steps = f"steps to {task.target:.4g}"
    header = ("arm", "setting", "best loss", "final loss", steps, "each seed", "fewer steps", "step time", "less time")
    return format_table([header, *(_task_row(name, figures) for name, figures in task.arms.items())])


def overall_table(overall: Mapping[str, OverallFigures]) -> str:
    """Return a row for each arm over all tasks; figures with ``<`` are bounds where a target was not reached.

    Example:
        >>> from gmn_optim.comparison import Protocol, compare
        >>> short = Protocol(seeds=1, tuning_seeds=1, steps=20, every=10, rounds=0)
        >>> figures = compare("quadratic", ["sgd-momentum"], protocol=short)
        >>> overall_table(figures.overall).splitlines()[2].split(" | ")[:4]
        ['adam        ', '1    ', '1      ', '1.00x      ']
    """
    times = "less time", "over 100,000 parameters"
    header = ("arm", "tasks", "reached", "fewer steps", *times, "against best rival", "worst final loss")
    rows = [
        (
            name,
            str(each.tasks),
            str(each.reached),
            _bounded(each.factor, each.reached < each.tasks),
            _bounded(each.time_factor, each.reached < each.tasks),
            _bounded(each.many_time_factor, each.many_missed > 0),
            _bounded(each.against_strong, each.reached < each.tasks),
            _times(each.worst_final) if math.isfinite(each.worst_final) else "failed",
        )
        for name, each in overall.items()
    ]
    return format_table([header, *rows])


def notes(task: TaskFigures) -> list[str]:
    """Return what a reader must know of arms, grids and failed trainings, one sentence each."""
    found = [f"{name}: {arms[name].remark}." for name in task.arms if name in arms and arms[name].remark]
    for name, arm in task.arms.items():
        span = f"{arm.grid[0]:g} to {arm.grid[-1]:g}"
        if arm.extended:
            found.append(
                f"{name}: the best setting lay at the edge of the stated grid, which was extended (lr {span})."
            )
        if arm.at_edge:
            found.append(f"{name}: the best setting ({arm.setting}) is at the edge of what was tried, lr {span}.")
        if arm.stopped:
            found.append(f"{name}: {arm.stopped} of {arm.curves.held_out.shape[1]} trainings failed.")
    return found


def to_json(task: TaskFigures) -> dict[str, Any]:
    """Return all figures of a task as JSON values, None for what is not finite or not reached.

    Example:
        >>> from gmn_optim.comparison import Protocol, compare
        >>> short = Protocol(seeds=1, tuning_seeds=1, steps=20, every=10, rounds=0)
        >>> figures = compare("quadratic", ["sgd-momentum"], protocol=short)
        >>> to_json(figures.tasks["quadratic"])["arms"]["adam"]["factor"]
        1.0
    """
    by_name = {name: _arm_json(task, name, arm) for name, arm in task.arms.items()}
    return {"target": task.target, "adam_steps": task.adam_steps, "steps": task.steps, "arms": by_name}


def overall_json(overall: Mapping[str, OverallFigures]) -> dict[str, Any]:
    """Return the overall figures as JSON values.

    Example:
        >>> from gmn_optim.comparison import Protocol, compare
        >>> short = Protocol(seeds=1, tuning_seeds=1, steps=20, every=10, rounds=0)
        >>> figures = compare("quadratic", ["sgd-momentum"], protocol=short)
        >>> overall_json(figures.overall)["adam"]["worst_final"]
        1.0
    """
    return {name: finite(asdict(each)) for name, each in overall.items()}


def finite(value: Any) -> Any:
    """Return a nested value with None for every number that is not finite.

    Example:
        >>> finite({"a": [1.0, math.inf]})
        {'a': [1.0, None]}
    """
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _arm_json(task: TaskFigures, name: str, arm: ArmFigures) -> dict[str, Any]:
    """Return an arm's figures as JSON values."""
    simple = {key: value for key, value in vars(arm).items() if key not in ("curves", "setting")}
    curves = {key: getattr(arm.curves, key).tolist() for key in ("steps", "held_out", "training")}
    setting = {"lr": arm.setting.lr, **dict(arm.setting.options)}
    derived = {"time_factor": arm.time_factor, "factor_at_most": factor_at_most(task, name)}
    return finite({"setting": setting, **simple, **derived, "curves": curves})


def _task_row(name: str, arm: ArmFigures) -> tuple[str, ...]:
    """Return the cells of one arm."""
    each = [steps for steps in arm.steps_to_target_each if math.isfinite(steps)]
    missed = len(arm.steps_to_target_each) - len(each)
    spread = f"{min(each):.0f} to {'never' if missed else f'{max(each):.0f}'}" if each else "never"
    return (
        name,
        str(arm.setting),
        _loss(arm.best_loss),
        _loss(arm.final_loss) + ("" if math.isnan(arm.final_std) else f" ± {arm.final_std:.2g}"),
        f"{arm.steps_to_target:.0f}" if math.isfinite(arm.steps_to_target) else "not reached",
        spread,
        _times(arm.factor or math.nan),
        _times(arm.step_time),
        _times(arm.time_factor or math.nan),
    )


def _bounded(value: float, is_bound: bool) -> str:
    """Return a mean of factors, marked as a bound where a target was missed."""
    return ("<" if is_bound and math.isfinite(value) else "") + _times(value)


def _loss(value: float) -> str:
    """Return a loss to four digits, or a word for a failed training."""
    return f"{value:.4g}" if math.isfinite(value) else "failed"


def _times(value: float) -> str:
    """Return a ratio."""
    return f"{value:.2f}x" if math.isfinite(value) else "-"
