"""The curves of a comparison as a picture."""

import importlib.util
import math
from pathlib import Path

from gmn_optim.comparison.figures import ArmFigures, TaskFigures
from gmn_optim.errors import InvalidArgumentError


def can_draw() -> bool:
    """Return whether matplotlib is installed.

    Example:
        >>> type(can_draw())
        <class 'bool'>
    """
    return importlib.util.find_spec("matplotlib") is not None


def draw_curves(task: TaskFigures, title: str, path: Path) -> None:
    """Draw the mean test curve of every arm, and a band from its lowest to its highest seed, over steps on a log axis.

    Args:
        task: The figures.
        title: Above the picture.
        path: Where the picture goes; its suffix names the format.

    Raises:
        InvalidArgumentError: matplotlib is not installed.
    """
    if not can_draw():
        raise InvalidArgumentError("matplotlib is not installed; pip install gmn_optim[compare] to draw curves")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for number, (name, arm) in enumerate(task.arms.items()):
        _draw_arm(axes, name, arm, number)
    axes.axhline(task.target, color="black", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", xlabel="steps", ylabel="test loss", title=title)
    _limit_losses(axes, task)
    for axis in (axes.xaxis, axes.yaxis):
        _label_sparsely(axis)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130)


def _draw_arm(axes: object, name: str, arm: ArmFigures, number: int) -> None:
    """Draw one arm; the curve starts at the first measurement after step 0, which a log axis lacks."""
    steps, losses = arm.curves.steps[1:], arm.curves.held_out[1:]
    style = ("-", "--", "-.")[number // 10 % 3]
    axes.plot(steps, losses.mean(1), style, color=f"C{number % 10}", label=f"{name} ({arm.setting})", linewidth=1.4)
    axes.fill_between(steps, losses.min(1).values, losses.max(1).values, color=f"C{number % 10}", alpha=0.12)


def _limit_losses(axes: object, task: TaskFigures) -> None:
    """Show from the lowest loss up to Adam's first measurements: a diverged arm must not flatten the others."""
    lowest = min(arm.curves.held_out[1:].min().item() for arm in task.arms.values())
    highest = task.arms["adam"].curves.held_out[1].max().item()
    if math.isfinite(highest) and highest > lowest > 0:
        axes.set(yscale="log", ylim=(lowest * (lowest / highest) ** 0.03, highest))


def _label_sparsely(axis: object) -> None:
    """Write plain numbers at 1, 2 and 5 times powers of ten, or wherever there is room if the range is shorter."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    axis.set_major_formatter("{x:.6g}")
    axis.set_minor_formatter("{x:.6g}")
    if axis.get_scale() == "log" and high > 5 * low:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_minor_formatter(NullFormatter())
