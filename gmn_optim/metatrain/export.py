"""From a meta-training run to a weights file whose card tells what it reached."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gmn_optim.errors import CheckpointError
from gmn_optim.metatrain.baselines import TunedBaseline, tune
from gmn_optim.metatrain.checkpoint import load_checkpoint
from gmn_optim.metatrain.evaluation import Curves, evaluate
from gmn_optim.metatrain.log import LOG, read_lines
from gmn_optim.metatrain.outer_loop import meta_path
from gmn_optim.metatrain.unroll import Meta, Unroll

REPLAY_STEPS = 20
"""Length of the trajectory that a card records."""


class Evaluation(NamedTuple):
    """One line of a run's log: the mean validation curve at an outer step."""

    step: int
    curve: list[float]

    def steps_to(self, target: float, every: int) -> float:
        """Return the inner steps after which the curve is at or below ``target``, or infinity."""
        reached = [number * every for number, value in enumerate(self.curve) if value <= target]
        return reached[0] if reached else math.inf


def read_evaluations(folder: Path) -> list[Evaluation]:
    """Return the evaluations that a run logged, in order.

    Raises:
        CheckpointError: the folder holds no log.
    """
    path = folder / LOG
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give the folder of a meta-training run")
    found = {line["step"]: line["evaluation"] for line in read_lines(path) if "evaluation" in line}
    return [Evaluation(step, [math.inf if v is None else v for v in curve]) for step, curve in sorted(found.items())]


def choose_step(evaluations: Sequence[Evaluation], target: float, every: int) -> int:
    """Return the outer step whose validation curve reaches ``target`` first; ties go to the lower end of the curve.

    Example:
        >>> choose_step([Evaluation(0, [2.0, 1.0, 0.9]), Evaluation(100, [2.0, 1.5, 0.8])], target=1.0, every=20)
        0
    """
    best = min(evaluations, key=lambda each: (each.steps_to(target, every), min(each.curve)))
    return best.step


def load_meta(folder: Path, step: int, unroll: Unroll) -> Meta:
    """Return the meta-parameters that a run kept at one of its evaluations."""
    tree, _ = load_checkpoint(meta_path(folder, step), unroll.meta_parameters(), {})
    return tree


def measure_results(
    unroll: Unroll, meta: Meta, seeds: Sequence[int], *, every: int = 20, progress: bool = False
) -> dict[str, Any]:
    """Return a card's figures on the test set: the rule, tuned Adam, and its own nominal term at its best step size.

    The target is the lowest point of tuned Adam's mean test curve, N the step at which it is reached there, and a
    factor N over the steps at which another mean curve is first at or below the target.

    Args:
        unroll: Task and rule.
        meta: The rule's meta-parameters.
        seeds: Of the trainings; equal for all three.
        every: Steps between two measurements.
        progress: Whether to show bars.
    """
    nominal_name = unroll.rule.config.nominal
    adam = tune(unroll.task, "adam", seeds, every=every, progress=progress)
    nominal = adam if nominal_name == "adam" else tune(unroll.task, nominal_name, seeds, every=every, progress=progress)
    curves = evaluate(unroll, meta, seeds, every=every, split="test", progress=progress)
    mean = adam.test.held_out.mean(1)
    target, needed = mean.min().item(), int(adam.test.steps[mean.argmin()])
    return {
        "split": "test",
        "seeds": list(seeds),
        "steps": unroll.task.horizon,
        "every": every,
        "target": _round(target),
        "adam_steps": needed,
        "adam": _describe_baseline(adam, target, needed),
        "nominal": {"name": nominal_name, **_describe_baseline(nominal, target, needed)},
        "rule": _describe(curves, target, needed),
    }


def record_replay(unroll: Unroll, meta: Meta, seed: int = 0, steps: int = REPLAY_STEPS) -> dict[str, Any]:
    """Return the first training losses of one inner training, which loading code must reproduce."""
    return {"seed": seed, "losses": [_round(value) for value in replay(unroll, meta, seed, steps).tolist()]}


def replay(unroll: Unroll, meta: Meta, seed: int, steps: int) -> Tensor:
    """Return the first training losses (steps) of one inner training."""
    generator = torch.Generator().manual_seed(seed)
    state = unroll.start(generator, 1)
    with torch.no_grad():
        return unroll.run(meta, state, unroll.batches(generator, steps, 1))[1][:, 0]


def _describe_baseline(baseline: TunedBaseline, target: float, needed: int) -> dict[str, Any]:
    """Return a baseline's figures."""
    return {"lr": baseline.lr, "grid": list(baseline.grid), **_describe(baseline.test, target, needed)}


def _describe(curves: Curves, target: float, needed: int) -> Mapping[str, Any]:
    """Return the figures of some trainings."""
    steps = curves.steps_to(target).item()
    each = curves.steps_to_each(target)
    best = curves.best()
    return {
        "best_loss": _round(curves.held_out.mean(1).min().item()),
        "best_loss_each": [_round(value) for value in best.tolist()],
        "steps_to_target": int(steps) if math.isfinite(steps) else None,
        "steps_to_target_each": [int(value) if math.isfinite(value) else None for value in each.tolist()],
        "factor": _round(needed / steps) if math.isfinite(steps) and steps else None,
    }


def _round(value: float) -> float:
    """Return six significant digits."""
    return float(f"{value:.6g}")
