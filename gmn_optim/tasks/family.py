"""Families of tasks: what meta-training draws its inner problems from."""

from abc import ABC, abstractmethod

import torch

from gmn_optim.registry import Registry
from gmn_optim.tasks.base import AbstractTask

families: Registry[type["AbstractTaskFamily"]] = Registry("task family")


class AbstractTaskFamily(ABC):
    """A distribution of tasks, with fixed tasks to validate and to test on.

    Attributes:
        validation: Names of registered tasks on which checkpoints are chosen.
        test: Names of registered tasks on which results are reported.

    Example:
        >>> from gmn_optim.tasks.quadratic import QuadraticTask
        >>> class Quadratics(AbstractTaskFamily):
        ...     validation = test = ("quadratic",)
        ...     def sample(self, generator):
        ...         return QuadraticTask(size=int(torch.randint(2, 9, (), generator=generator)))
        >>> Quadratics().sample(torch.Generator().manual_seed(0)).name
        'quadratic'
    """

    validation: tuple[str, ...]
    test: tuple[str, ...]

    @abstractmethod
    def sample(self, generator: torch.Generator) -> AbstractTask:
        """Return a task drawn from the generator alone."""
