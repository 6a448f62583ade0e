"""One training of one arm in an ordinary PyTorch loop, its held-out loss measured along the way."""

import copy
import math
import time
from typing import NamedTuple

import torch
from torch import nn

from gmn_optim.comparison.arms import Arm, OptimizerSet, Setting
from gmn_optim.errors import InvalidArgumentError
from gmn_optim.tasks.base import AbstractTask, Batch, Split


class Measurements(NamedTuple):
    """What one training gave.

    Attributes:
        held_out: Held-out loss at steps 0, every, 2 every, ...; infinite from where a loss was not finite.
        training: Mean training loss of the steps before each of these points; not a number at 0.
        seconds: Of all training steps; neither batches nor measurements count.
        stopped: Why it ended early, or an empty string.
    """

    held_out: list[float]
    training: list[float]
    seconds: float
    stopped: str = ""


class TrainingLoop:
    """A copy of a task's network, its optimizer and its batches.

    A seed gives the same initial parameters and the same batches to every arm. The optimizer is built on the network
    whose own parameters are trained, so that hooks see every pass.

    Args:
        task: The problem; it is left as it is.
        arm: Who trains.
        setting: Its step size and options.
        seed: Of initial parameters and batches.
        total_steps: Length of the training, for schedules.

    Raises:
        InvalidArgumentError: the task's initial parameters are not those of its network.

    Example:
        >>> from gmn_optim.comparison.arms import arms
        >>> from gmn_optim.tasks.quadratic import QuadraticTask
        >>> loop = TrainingLoop(QuadraticTask(noise=0.0), arms["adam"], Setting(0.1), seed=0, total_steps=2)
        >>> loop.step() > loop.step()
        True
    """

    def __init__(self, task: AbstractTask, arm: Arm, setting: Setting, seed: int, total_steps: int) -> None:
        self.task = copy.copy(task)
        self.task.module = copy.deepcopy(task.module)
        self._generator = torch.Generator().manual_seed(seed)
        load_initial_parameters(self.task, self._generator)
        self.optimizers: OptimizerSet = arm.build(self.task.module, setting, total_steps)
        self.optimizers.set_training(True)
        self.task.module.train()
        self.seconds = 0.0

    @property
    def module(self) -> nn.Module:
        """The network that is trained."""
        return self.task.module

    def step(self) -> float:
        """Take one step and return the training loss before it."""
        batch = self.task.sample_batch(self._generator)
        began = time.perf_counter()
        self.optimizers.zero_grad()
        loss = self.task.loss(dict(self.module.named_parameters()), batch)
        loss.backward()
        self.optimizers.step()
        self.seconds += time.perf_counter() - began
        return loss.item()

    @torch.no_grad()
    def measure(self, batch: Batch) -> float:
        """Return the loss on a held-out batch, infinity instead of not a number."""
        self._set_training(False)
        loss = self.task.loss(dict(self.module.named_parameters()), batch).item()
        self._set_training(True)
        return loss if math.isfinite(loss) else math.inf

    def _set_training(self, training: bool) -> None:
        """Put the network and its optimizers into training or evaluation mode."""
        self.module.train(training)
        self.optimizers.set_training(training)


def train(
    task: AbstractTask,
    arm: Arm,
    setting: Setting,
    *,
    seed: int,
    split: Split,
    steps: int,
    every: int,
    examples: int | None = None,
) -> Measurements:
    """Train from scratch and return what was measured.

    A loss that is not finite, or a matrix that an optimizer cannot decompose, ends the training; what would have been
    measured later counts as infinite. Torch's own generator is seeded for dropout, and restored.

    Args:
        task: The problem.
        arm: Who trains.
        setting: Its step size and options.
        seed: Of initial parameters and batches.
        split: What is measured on, ``validation`` or ``test``.
        steps: Length of the training.
        every: Steps between two measurements.
        examples: The most that are measured on; None for all.

    Example:
        >>> from gmn_optim.comparison.arms import arms
        >>> from gmn_optim.tasks.quadratic import QuadraticTask
        >>> task = QuadraticTask()
        >>> found = train(task, arms["adam"], Setting(0.1), seed=1, split="test", steps=20, every=10)
        >>> len(found.held_out), found.held_out[2] < found.held_out[0]
        (3, True)
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loop = TrainingLoop(task, arm, setting, seed, steps)
        batch = evenly_spaced(task.held_out(split), examples)
        held_out, training, stopped = [loop.measure(batch)], [math.nan], ""
        for _ in range(steps // every):
            mean, stopped = _take_steps(loop, every)
            held_out.append(math.inf if stopped else loop.measure(batch))
            training.append(mean)
            stopped = stopped or ("" if math.isfinite(held_out[-1]) else "the held-out loss is not finite")
            if stopped:
                break
    missing = [math.inf] * (1 + steps // every - len(held_out))
    return Measurements(held_out + missing, training + missing, loop.seconds, stopped)


def evenly_spaced(batch: Batch, examples: int | None) -> Batch:
    """Return at most so many evenly spaced examples of a batch; all of it if its parts differ in length.

    Example:
        >>> [part.tolist() for part in evenly_spaced((torch.arange(6), torch.arange(6)), 3)]
        [[0, 2, 4], [0, 2, 4]]
    """
    lengths = {len(part) if part.dim() else 0 for part in batch}
    count = lengths.pop()
    if examples is None or lengths or count <= examples:
        return batch
    chosen = torch.arange(examples) * count // examples
    return tuple(part[chosen] for part in batch)


def _take_steps(loop: TrainingLoop, count: int) -> tuple[float, str]:
    """Take some steps; return the mean training loss, and why the training must end if it must."""
    total = 0.0
    for _ in range(count):
        try:
            total += loop.step()
        except torch.linalg.LinAlgError as error:
            return math.inf, f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if not math.isfinite(total):
            return math.inf, "the training loss is not finite"
    return total / count, ""


def load_initial_parameters(task: AbstractTask, generator: torch.Generator) -> None:
    """Draw a task's initial parameters into its network.

    Raises:
        InvalidArgumentError: names or shapes are not those of the network.

    Example:
        >>> from gmn_optim.tasks.quadratic import QuadraticTask
        >>> task = QuadraticTask()
        >>> load_initial_parameters(task, torch.Generator())
        >>> task.module.x.tolist()
        [1.0, 1.0]
    """
    drawn, own = task.init_parameters(generator), dict(task.module.named_parameters())
    shapes = [{name: tuple(value.shape) for name, value in each.items()} for each in (drawn, own)]
    if shapes[0] != shapes[1]:
        raise InvalidArgumentError(
            f"{type(task).__name__}.init_parameters gives {shapes[0]}, its module has {shapes[1]}; a task that is "
            "compared must name every parameter of its module, and no other"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(drawn[name])
