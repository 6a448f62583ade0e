"""How often to make the basis of ``kronecker_adam`` anew, and how: steps to tuned Adam's best loss, and time of a step.

    python examples/benchmarks/kronecker_basis.py

Every optimizer trains from the same initial parameters on the same batches, at every lr of its grid; the lr is chosen
by the lowest loss on the validation set. Figures are of the test set, means over the seeds; those at the default lr
stand beside them. A training step is timed with GMNOptimizer on the task's network, forward and backward pass included,
against the same step with torch.optim.Adam, all in turn, so that a drift of the machine meets all of them; the ratio is
the median over rounds.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from gmn_optim import GMNOptimizer
from gmn_optim.metatrain.baselines import TunedBaseline, tune
from gmn_optim.report import format_table
from gmn_optim.rule import RuleConfig, UpdateRule
from gmn_optim.rule.kronecker import KroneckerAdamTerm
from gmn_optim.tasks import tasks
from gmn_optim.tasks.base import AbstractTask

ADAM_LRS = tuple(0.0005 * j for j in range(1, 21))
KRONECKER_LRS = (0.0025, 0.0035, 0.005, 0.007, 0.01, 0.014, 0.02)


class GramAdamTerm(KroneckerAdamTerm):
    """The same with bases from the gradient's Gram matrices alone, as SOAP makes them."""

    def directions(self, chunks: Any, bases: Any, around: Any) -> Any:
        """Return directions, buffers and bases, the factors left out."""
        return super().directions(chunks, bases, around._replace(factors={}))


TERMS: dict[str, Callable[[], KroneckerAdamTerm] | None] = {
    "Adam": None,
    **{
        f"kronecker_adam, {method} every {k} steps": lambda k=k, method=method: KroneckerAdamTerm(k, method)
        for method in ("eigh", "qr")
        for k in (1, 10, 50)
    },
    "Gram matrices alone, eigh every 10 steps": lambda: GramAdamTerm(10, "eigh"),
}


def make_rule(name: str, alpha: float) -> UpdateRule:
    """Return a nominal term alone."""
    make = TERMS[name]
    rule = UpdateRule(RuleConfig(nominal="kronecker_adam" if make else "adam", body=None, alpha=alpha))
    if make is not None:
        rule.nominal = make()
    return rule.requires_grad_(False)


class TimedTraining:
    """A training of the task's network, a few steps at a time.

    Args:
        task: The inner problem; its module is copied.
        optimizer: Makes an optimizer of a module.
    """

    def __init__(self, task: AbstractTask, optimizer: Callable[[torch.nn.Module], torch.optim.Optimizer]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.model = type(task)().module
        self.model.load_state_dict(task.init_parameters(generator))
        self.optimizer = optimizer(self.model)
        self.images, self.labels = task.sample_batch(generator)

    def seconds(self, steps: int) -> float:
        """Return the time of one step, averaged over some."""
        began = time.perf_counter()
        for _ in range(steps):
            self.optimizer.zero_grad()
            torch.nn.functional.cross_entropy(self.model(self.images), self.labels).backward()
            self.optimizer.step()
        return (time.perf_counter() - began) / steps


def time_steps(task: AbstractTask, names: Sequence[str], rounds: int, steps: int) -> dict[str, float]:
    """Return by name the time of a training step as a multiple of that with torch.optim.Adam."""
    trainings = {
        name: TimedTraining(task, lambda m, n=name: GMNOptimizer(m, weights=make_rule(n, 0.01))) for name in names
    }
    adam = TimedTraining(task, lambda model: torch.optim.Adam(model.parameters()))
    for each in (adam, *trainings.values()):
        each.seconds(20)  # the steps at which every basis is young
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for _ in tqdm(range(rounds), desc="timing"):
        base = adam.seconds(steps)
        for name, each in trainings.items():
            ratios[name].append(each.seconds(steps) / base)
    return {name: statistics.median(values) for name, values in ratios.items()}


def steps_to(found: TunedBaseline, target: float, adam_steps: float) -> str:
    """Return the steps to a loss, and how many times fewer than tuned Adam's they are."""
    steps = found.test.steps_to(target).item()
    return f"{steps:.0f} ({adam_steps / steps:.1f}x)" if math.isfinite(steps) and steps else "not reached"


def lowest(found: TunedBaseline) -> float:
    """Return the lowest point of the mean curve."""
    return found.test.held_out.mean(1).min().item()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="fashion-mnist-mlp", help="a classification task of gmn_optim.tasks")
    parser.add_argument("--steps", type=int, default=2_000, help="of a training")
    parser.add_argument("--every", type=int, default=20, help="steps between two measurements of the loss")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7, help="of the timing")
    parser.add_argument("--smoke", action="store_true", help="a few steps of a few optimizers, to see that it runs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    names, grids, timed = [*TERMS], (ADAM_LRS, KRONECKER_LRS), 100
    if options.smoke:
        options.steps, options.every, options.seeds, options.rounds = 4, 2, 1, 1
        names, grids, timed = names[:2], (ADAM_LRS[:2], KRONECKER_LRS[:2]), 2
    task, seeds = tasks[options.task](), range(1, options.seeds + 1)
    tuned, default = {}, {}
    for name in tqdm(names, desc="training"):
        grid = grids[TERMS[name] is not None]
        rule = make_rule(name, grid[0])
        settings = {"steps": options.steps, "every": options.every}
        tuned[name] = tune(task, rule, seeds, lrs=grid, **settings)
        default[name] = tune(task, rule, seeds, lrs=[rule.nominal.default_alpha], **settings)
    target = lowest(tuned["Adam"])
    adam_steps = tuned["Adam"].test.steps_to(target).item()
    ratios = time_steps(task, names, options.rounds, timed)
    rows = [("optimizer", "lr", "best loss", f"steps to {target:.4f}", "at the default lr", "time of a step")]
    for name in names:
        both = (steps_to(found[name], target, adam_steps) for found in (tuned, default))
        rows.append((name, f"{tuned[name].lr:g}", f"{lowest(tuned[name]):.4f}", *both, f"{ratios[name]:.1f}x"))
    print(format_table(rows))


if __name__ == "__main__":
    main()
