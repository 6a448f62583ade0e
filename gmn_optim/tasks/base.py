"""What meta-training asks of a task: three pure methods."""

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from gmn_optim.registry import Registry

Parameters = dict[str, Tensor]
Batch = tuple[Tensor, ...]
Split = Literal["train", "validation", "test"]

tasks: Registry[type["AbstractTask"]] = Registry("task")


class AbstractTask(ABC):
    """An inner problem: initial parameters, batches, and a loss. Randomness is passed in as a generator.

    Attributes:
        name: What logs and tables call the task.
        module: The network; its own parameters are placeholders for those that are passed in.
        horizon: Steps of a full training.
        loss_limit: Losses above this count as this in meta-training, so that a failed run stays bounded.
        loss_floor: Added to a loss before its logarithm is taken, about the least loss that matters.

    Example:
        >>> class Parabola(AbstractTask):
        ...     name, module, horizon, loss_limit = "parabola", nn.Identity(), 10, 100.0
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

    name: str
    module: nn.Module
    horizon: int
    loss_limit: float
    loss_floor: float = 0.01

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
