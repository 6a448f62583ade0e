"""What the falling bound of the default's pace does: with it, without one cause, the nominal term alone, tuned Adam.

The bound falls with the steps (annealing), where few data points make the gradients (concentration), and both sooner
where data were seen again and again (epochs).

    python examples/benchmarks/annealing.py

Trains validation tasks of the family ``default``, which come with the package, and prints a table of validation losses,
means over the seeds. Adam has the step size of five with the lowest mean loss; the others run untuned.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean
from typing import NamedTuple

import torch
from tqdm import tqdm

from gmn_optim import GMNOptimizer
from gmn_optim.comparison.arms import Arm, Setting, arms
from gmn_optim.comparison.own_arms import nominal_rule
from gmn_optim.comparison.training import train
from gmn_optim.report import format_table
from gmn_optim.rule import UpdateRule
from gmn_optim.tasks import tasks
from gmn_optim.weights import load_weights

ADAM_LRS = (0.001, 0.002, 0.004, 0.008, 0.016)
EVERY, EXAMPLES, FIRST_SEED = 20, 2_000, 740_000


class Curve(NamedTuple):
    """Mean validation losses of an arm at steps 0, 20, 40, ..."""

    arm: str
    losses: list[float]

    def cells(self, target: float) -> tuple[str, ...]:
        """Return the arm, its lowest loss and where that is, its final loss, and when it is as low as the target."""
        lowest = min(self.losses)
        reached = next((f"{EVERY * n}" for n, loss in enumerate(self.losses) if loss <= target), "not reached")
        return self.arm, f"{lowest:.4g}", f"{EVERY * self.losses.index(lowest)}", f"{self.losses[-1]:.4g}", reached


def without(rule: UpdateRule, *names: str) -> UpdateRule:
    """Return the rule with a bound of the pace that does not fall for these causes."""
    other = UpdateRule(replace(rule.config, **dict.fromkeys(names, 0.0))).requires_grad_(False)
    other.load_state_dict(rule.state_dict())
    return other


def own_arms() -> list[Arm]:
    """Return the default, the default without each cause and without all, and its nominal term."""
    rule = load_weights("default").rule
    chosen = {
        "default": rule,
        "without annealing": without(rule, "annealing"),
        "without concentration": without(rule, "concentration"),
        "without epochs": without(rule, "epochs"),
        "without all": without(rule, "annealing", "concentration", "epochs"),
        "nominal term": nominal_rule(rule),
    }
    return [
        Arm(name, lambda model, lr, total_steps, rule=each: GMNOptimizer(model, weights=rule, lr=lr), (1.0,))
        for name, each in chosen.items()
    ]


def curve(name: str, task: str, arm: Arm, lr: float, options: argparse.Namespace) -> Curve:
    """Return the mean curve of an arm at a step size."""
    found = [
        train(
            tasks[task](),
            arm,
            Setting(lr),
            seed=FIRST_SEED + seed,
            split="validation",
            steps=options.steps,
            every=EVERY,
            examples=EXAMPLES,
        ).held_out
        for seed in range(options.seeds)
    ]
    return Curve(name, [mean(losses) for losses in zip(*found, strict=True)])


def rows_of(task: str, options: argparse.Namespace, bar: "tqdm[None]") -> list[tuple[str, ...]]:
    """Return the table's rows of one task."""
    tuned = []
    for lr in options.adam_lrs:
        tuned.append(curve(f"Adam, lr {lr:g} (tuned)", task, arms["adam"], lr, options))
        bar.update()
    adam = min(tuned, key=lambda each: min(each.losses))
    curves = [adam]
    for arm in own_arms():
        curves.append(curve(arm.name, task, arm, 1.0, options))
        bar.update()
    return [(task, *each.cells(min(adam.losses))) for each in curves]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and print the table."""
    parser = argparse.ArgumentParser(description="The default with and without a bound that falls.")
    names = ["carroll-windows-mlp", "fmnist14-mlp", "letters-mlp", "few-letters-mlp", "few-fmnist8-mlp"]
    names = [f"validation-{name}" for name in names]
    parser.add_argument("--tasks", nargs="+", default=names, metavar="NAME")
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args(arguments)
    options.adam_lrs = ADAM_LRS[:1] if options.smoke else ADAM_LRS
    if options.smoke:
        options.tasks, options.steps, options.seeds = options.tasks[:1], EVERY, 1
    torch.set_num_threads(1)
    with tqdm(total=len(options.tasks) * (len(options.adam_lrs) + len(own_arms())), desc="arms") as bar:
        rows = [row for task in options.tasks for row in rows_of(task, options, bar)]
    fields = ("task", "optimizer", "lowest loss", "at step", "final loss", "steps to tuned Adam's lowest")
    print(format_table([fields, *rows]))


if __name__ == "__main__":
    main()
