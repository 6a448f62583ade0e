"""What meta-training asks of a task: three pure methods."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from gmn_optim.registry import Registry

Parameters = dict[str, Tensor]
Batch = tuple[Tensor, ...]
Split = Literal["train", "validation", "test"]

tasks: Registry[Callable[..., "AbstractTask"]] = Registry("task")
"""What makes a task, by name: a class or a function, called without arguments."""


class AbstractTask(ABC):
    """An inner problem: initial parameters, batches, and a loss. Randomness is passed in as a generator.

    Attributes:
        module: The network; its own parameters are placeholders for those that are passed in.
        horizon: Steps of a full training.
        loss_limit: Losses above this count as this in meta-training, so that a failed run stays bounded.
        loss_floor: Added to a loss before its logarithm is taken, so that log(loss + floor) stays tame when a task is
            memorised: about 0.02 log(classes) for a classifier, 1e-3 of the target's variance for a squared error.
        name: Short description, or the name in :data:`tasks`; may be set.

    Example:
        >>> class Parabola(AbstractTask):
        ...     module, horizon, loss_limit = nn.Identity(), 10, 100.0
        ...     def init_parameters(self, generator):
        ...         return {"x": torch.ones(1)}
        ...     def sample_batch(self, generator, shape=()):
        ...         return (torch.randn((*shape, 1), generator=generator),)
        ...     def loss(self, parameters, batch):
        ...         return (parameters["x"] - batch[0]).square().sum()
        >>> task = Parabola()
        >>> task.loss(task.init_parameters(torch.Generator()), (torch.zeros(1),)).item()
        1.0
    """

    module: nn.Module
    horizon: int
    loss_limit: float
    loss_floor: float = 0.0
    name: str = ""

    @abstractmethod
    def init_parameters(self, generator: torch.Generator) -> Parameters:
        """Return fresh parameters by name."""

    @abstractmethod
    def sample_batch(self, generator: torch.Generator, shape: tuple[int, ...] = ()) -> Batch:
        """Return a training batch, or ``shape`` of them along leading axes."""

    @abstractmethod
    def loss(self, parameters: Parameters, batch: Batch) -> Tensor:
        """Return the mean loss () of one batch."""

    def held_out(self, split: Split) -> Batch:
        """Return the whole held-out set of ``validation`` or ``test`` as one batch; by default a fixed sample."""
        return self.sample_batch(torch.Generator().manual_seed({"train": 0, "validation": 1, "test": 2}[split]))
