"""Ten thousand steps on a small model: neither the memory of the process nor the time of a step grows.

    python examples/benchmarks/long_run.py

Trains the README's classifier on Fashion-MNIST at 8x8. For each thousand steps it prints the mean loss, the memory of
the process and what the optimizer says that it holds at their end, and the median time of a step: both passes and the
update.
"""

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gmn_optim import GMNOptimizer
from gmn_optim.report import format_table
from gmn_optim.tasks import load_fashion_mnist_8x8

BATCH_SIZE = 128
STATM = Path("/proc/self/statm")
SMOKE = ["--steps", "20", "--every", "10"]


class Stage(NamedTuple):
    """What was measured over some steps.

    Attributes:
        steps: Steps taken since the start.
        loss: Mean training loss.
        resident: Bytes of the process in memory at the end.
        held: Bytes that the optimizer holds at the end.
        seconds: Median time of a step.
    """

    steps: int
    loss: float
    resident: int
    held: int
    seconds: float


class Training:
    """A model, its optimizer and the data."""

    def __init__(self, weights: str, seed: int) -> None:
        torch.manual_seed(seed)
        raw = load_fashion_mnist_8x8()
        std, mean = torch.std_mean(raw.train_images.float())
        self.images, self.labels = (raw.train_images - mean) / std, raw.train_labels
        self.model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        self.optimizer = GMNOptimizer(self.model, weights=weights)

    def step(self) -> Tensor:
        """Take one step; return the loss () before it."""
        chosen = torch.randint(len(self.labels), (BATCH_SIZE,))
        loss = nn.functional.cross_entropy(self.model(self.images[chosen]), self.labels[chosen])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def stage(self, first: int, steps: int, bar: tqdm) -> Stage:
        """Take some steps after the first ones, and measure them."""
        seconds, total = [], 0.0
        for _ in range(steps):
            began = time.perf_counter()
            loss = self.step()
            seconds.append(time.perf_counter() - began)
            total += loss.item()
            bar.update()
        gc.collect()
        held = self.optimizer.memory_usage().total
        return Stage(first + steps, total / steps, resident_bytes(), held, statistics.median(seconds))


def resident_bytes() -> int:
    """Return the memory of this process: what is resident now on Linux, the most that ever was on other systems."""
    if STATM.exists():
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def describe(stages: Sequence[Stage]) -> str:
    """Return the table."""
    header = ("steps", "mean loss", "memory of the process", "held by the optimizer", "median time of a step")
    rows = [
        (
            f"{stage.steps:,}",
            f"{stage.loss:.4f}",
            f"{stage.resident / 2**20:.1f} MiB",
            f"{stage.held / 2**10:.1f} KiB",
            f"{stage.seconds * 1e3:.2f} ms",
        )
        for stage in stages
    ]
    return format_table([header, *rows])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=1_000, help="steps of a row of the table")
    parser.add_argument("--weights", default="default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help=f"a run of a second: {' '.join(SMOKE)}")
    options = parser.parse_args(arguments)
    if options.smoke:
        options = parser.parse_args(SMOKE)
    torch.set_num_threads(options.threads)
    training = Training(options.weights, options.seed)
    with tqdm(total=options.steps, desc="steps") as bar:
        starts = range(0, options.steps, options.every)
        stages = [training.stage(start, min(options.every, options.steps - start), bar) for start in starts]
    print(describe(stages))


if __name__ == "__main__":
    main()
