"""Tuned baselines: a nominal term alone, at every step size of a grid, all trainings side by side."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from gmn_optim.metatrain.evaluation import Curves, evaluate
from gmn_optim.metatrain.unroll import Unroll
from gmn_optim.rule import RuleConfig, UpdateRule
from gmn_optim.rule.scalars import SPEED
from gmn_optim.tasks.base import AbstractTask, Split

ADAM_LRS = tuple(0.0005 * j for j in range(1, 21))
"""The grid of the paper: 0.0005 j, j = 1..20 (Gelberg et al. 2025, section 7.2)."""

MOMENTUM_LRS = tuple(float(f"{0.05 * 2 ** (j / 2):.3g}") for j in range(12))
"""Twelve step sizes from 0.05 up to about 2.3, by factors of the square root of 2."""

KRONECKER_LRS = tuple(float(f"{0.00125 * 2 ** (j / 2):.3g}") for j in range(11))
"""Eleven step sizes from 0.00125 up to 0.04, by factors of the square root of 2."""

GRIDS = {"adam": ADAM_LRS, "momentum": MOMENTUM_LRS, "kronecker_adam": KRONECKER_LRS}


class TunedBaseline(NamedTuple):
    """A nominal term at its best step size.

    Attributes:
        lr: The step size whose mean validation curve has the lowest point.
        grid: All that were tried.
        validation: Curves on the validation set at ``lr``.
        test: Curves on the test set at ``lr``, the same trainings.
    """

    lr: float
    grid: tuple[float, ...]
    validation: Curves
    test: Curves


def tune(
    task: AbstractTask,
    nominal: str | UpdateRule,
    seeds: Sequence[int],
    *,
    lrs: Sequence[float] = (),
    steps: int | None = None,
    every: int = 20,
    progress: bool = False,
) -> TunedBaseline:
    """Return a nominal term alone at the best step size of a grid.

    Args:
        task: The inner problem.
        nominal: ``adam``, ``momentum``, ``kronecker_adam``, or another registered nominal term if ``lrs`` is given;
            or a rule, whose alpha is tuned.
        seeds: One per training at each step size.
        lrs: The grid; by default the one in :data:`GRIDS`.
        steps: Inner steps; the task's horizon by default.
        every: Steps between two measurements.
        progress: Whether to show bars.
    """
    rule = nominal if isinstance(nominal, UpdateRule) else UpdateRule(RuleConfig(nominal=nominal, body=None))
    grid = tuple(lrs) or GRIDS[rule.config.nominal]
    unroll = Unroll(task, rule)
    validation = sweep_step_sizes(unroll, grid, seeds, "validation", steps, every, progress=progress)
    best = int(validation.held_out.unflatten(1, (len(grid), -1)).mean(2).min(0).values.argmin())
    chosen = slice(best * len(seeds), (best + 1) * len(seeds))
    test = sweep_step_sizes(unroll, grid[best : best + 1], seeds, "test", steps, every, progress=progress)
    return TunedBaseline(grid[best], grid, Curves(*(c if c.dim() == 1 else c[:, chosen] for c in validation)), test)


def sweep_step_sizes(
    unroll: Unroll,
    grid: Sequence[float],
    seeds: Sequence[int],
    split: Split,
    steps: int | None,
    every: int,
    averages: bool = False,
    progress: bool = False,
) -> Curves:
    """Return the curves of every step size, seeds of one step size beside one another."""
    own = unroll.meta_parameters()
    count = len(grid) * len(seeds)
    meta = {name: value.expand(count, *value.shape).clone() for name, value in own.items()}
    first = unroll.rule.alpha.initial
    meta["alpha.raw"] = torch.tensor([math.log(lr / first) / SPEED for lr in grid for _ in seeds])
    how = {"steps": steps, "every": every, "split": split, "averages": averages, "progress": progress}
    return evaluate(unroll, meta, [*seeds] * len(grid), **how)
