"""One classifier, trained by tuned Adam and by GMNOptimizer: same weights at the start, same data in the same order.

    python examples/replace_adam.py

Adam is tuned over twenty step sizes on validation images; GMNOptimizer runs untuned, with the weights that ship with
the package. Of it two things are measured: the parameters in training, for which nothing but Adam's line is replaced,
and their averages, for which ``eval()`` is called before each measurement and ``train()`` after it. Prints a table on
test images and draws the curves to ``replace_adam.png``.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gmn_optim import GMNOptimizer
from gmn_optim.report import format_table
from gmn_optim.tasks import load_fashion_mnist_8x8

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class Settings:
    """What is trained, for how long, and what Adam is tuned over."""

    steps: int = 2_000
    batch_size: int = 128
    hidden: int = 32
    every: int = 20
    seeds: tuple[int, ...] = (1, 2, 3)
    adam_lrs: tuple[float, ...] = tuple(0.0005 * j for j in range(1, 21))
    weights: str = "default"


SMOKE = Settings(steps=20, every=10, seeds=(1,), adam_lrs=(0.005, 0.01))


class Images(NamedTuple):
    """Standardized images (n, 64) and labels (n)."""

    images: Tensor
    labels: Tensor


class Data(NamedTuple):
    """Fashion-MNIST at 8x8: 55,000 images to train on, 5,000 to tune on, 10,000 to report on."""

    train: Images
    validation: Images
    test: Images


class Run(NamedTuple):
    """One training: losses at steps 0, every, 2 every, ... and the seconds that all steps took.

    ``averaged`` are test losses of averages, where the optimizer has any.
    """

    validation: list[float]
    test: list[float]
    averaged: list[float]
    seconds: float


def load_data() -> Data:
    """Return the images, standardized by one mean and one deviation."""
    raw = load_fashion_mnist_8x8()
    std, mean = torch.std_mean(raw.train_images.float())
    train, test = (raw.train_images - mean) / std, (raw.test_images - mean) / std
    return Data(
        Images(train[:-5_000], raw.train_labels[:-5_000]),
        Images(train[-5_000:], raw.train_labels[-5_000:]),
        Images(test, raw.test_labels),
    )


def train(make_optimizer: MakeOptimizer, data: Data, seed: int, settings: Settings) -> Run:
    """Train once; the seed decides the initial weights and the order of the data."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, settings.hidden), nn.ReLU(), nn.Linear(settings.hidden, 10))
    batches = torch.randint(len(data.train.labels), (settings.steps, settings.batch_size))
    optimizer = make_optimizer(model)
    run = Run([], [], [], 0.0)
    note_losses(run, model, optimizer, data)
    for start in range(0, settings.steps, settings.every):
        began = time.perf_counter()
        for batch in batches[start : start + settings.every]:
            loss = nn.functional.cross_entropy(model(data.train.images[batch]), data.train.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        run = run._replace(seconds=run.seconds + time.perf_counter() - began)
        note_losses(run, model, optimizer, data)
    return run


def note_losses(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, data: Data) -> None:
    """Append the losses of a model in training, and of its averages."""
    run.validation.append(measure(model, data.validation))
    run.test.append(measure(model, data.test))
    if isinstance(optimizer, GMNOptimizer):
        optimizer.eval()
        run.averaged.append(measure(model, data.test))
        optimizer.train()


@torch.no_grad()
def measure(model: nn.Module, data: Images) -> float:
    """Return the mean loss on held-out images."""
    return nn.functional.cross_entropy(model(data.images), data.labels).item()


def mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean over seeds at every point."""
    return [sum(values) / len(values) for values in zip(*curves, strict=True)]


def make_adam_with(lr: float, model: nn.Module) -> torch.optim.Optimizer:
    """Return Adam with a step size."""
    return torch.optim.Adam(model.parameters(), lr=lr)


def tune_adam(data: Data, settings: Settings) -> tuple[float, list[Run]]:
    """Return the step size with the lowest mean validation curve, and its runs."""
    best: tuple[float, float, list[Run]] | None = None
    for lr in tqdm(settings.adam_lrs, desc="tuning Adam"):
        make_adam = partial(make_adam_with, lr)
        runs = [train(make_adam, data, seed, settings) for seed in settings.seeds]
        lowest = min(mean_curve([run.validation for run in runs]))
        if best is None or lowest < best[0]:
            best = (lowest, lr, runs)
    assert best is not None
    return best[1], best[2]


def steps_to(curve: Sequence[float], target: float, every: int) -> float:
    """Return the steps after which a curve is first at or below the target, or infinity."""
    return next((point * every for point, value in enumerate(curve) if value <= target), math.inf)


def compare(adam_lr: float, adam: list[Run], gmn: list[Run], settings: Settings) -> str:
    """Return the table; the target is the lowest point of tuned Adam's mean test curve."""
    target = min(mean_curve([run.test for run in adam]))
    seconds = [sum(run.seconds for run in runs) for runs in (adam, gmn)]
    measured = [
        (f"Adam, lr {adam_lr:g} (tuned)", mean_curve([run.test for run in adam]), 1.0),
        ("GMNOptimizer(model)", mean_curve([run.test for run in gmn]), seconds[1] / seconds[0]),
        ("the same after eval()", mean_curve([run.averaged for run in gmn]), seconds[1] / seconds[0]),
    ]
    adams_steps = steps_to(measured[0][1], target, settings.every)
    rows = [("optimizer", "best test loss", f"steps to {target:.4f}", "step ratio", "time per step", "time to target")]
    for label, curve, time_per_step in measured:
        needed = steps_to(curve, target, settings.every)
        steps = needed / adams_steps
        shown = (f"{needed:.0f}", f"{steps:.2f}") if math.isfinite(needed) else ("not reached", "-")
        to_target = f"{steps * time_per_step:.2f}" if math.isfinite(needed) else "-"
        rows.append((label, f"{min(curve):.4f}", *shown, f"{time_per_step:.2f}", to_target))
    return format_table(rows)


def draw(adam_lr: float, adam: list[Run], gmn: list[Run], settings: Settings, path: Path) -> None:
    """Draw the mean test curves with the range over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    steps = range(0, settings.steps + 1, settings.every)
    for label, curves, color in (
        (f"Adam, tuned (lr {adam_lr:g})", [run.test for run in adam], "#777777"),
        ("GMNOptimizer, untuned", [run.test for run in gmn], "#c2410c"),
        ("the same after eval(): averages", [run.averaged for run in gmn], "#1d4ed8"),
    ):
        axes.plot(steps, mean_curve(curves), color=color, label=label, linewidth=1.8)
        low, high = ([pick(values) for values in zip(*curves, strict=True)] for pick in (min, max))
        axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
    target = min(mean_curve([run.test for run in adam]))
    axes.axhline(target, color="#777777", linestyle=":", linewidth=1)
    axes.annotate(f"Adam's best, {target:.3f}", (0, target), (8, -4), textcoords="offset points", ha="left", va="top")
    bottom = min(target - 0.04, *(min(run.averaged) - 0.01 for run in gmn))
    axes.set(xlabel="step", ylabel="test loss", xlim=(0, settings.steps), ylim=(bottom, target + 0.36))
    axes.set_title(f"Fashion-MNIST 8x8, MLP 64-{settings.hidden}-10: mean and range of {len(settings.seeds)} seeds")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("replace_adam.png"), help="where the picture goes")
    parser.add_argument("--weights", default=Settings.weights, help="name or path of the weights")
    parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that it runs")
    options = parser.parse_args(arguments)
    settings = Settings(**{**(SMOKE if options.smoke else Settings()).__dict__, "weights": options.weights})
    data = load_data()
    adam_lr, adam = tune_adam(data, settings)

    def make_gmn(model: nn.Module) -> torch.optim.Optimizer:
        return GMNOptimizer(model, weights=settings.weights)

    gmn = [train(make_gmn, data, seed, settings) for seed in tqdm(settings.seeds, desc="GMNOptimizer")]
    print(compare(adam_lr, adam, gmn, settings))
    draw(adam_lr, adam, gmn, settings, options.out)
    print(f"\nCurves: {options.out}")


if __name__ == "__main__":
    main()
