"""What meta-training draws its tasks from."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from gmn_optim.registry import Registry
from gmn_optim.tasks.base import AbstractTask


class AbstractTaskFamily(ABC):
    """A distribution of tasks, and fixed tasks that it does not draw.

    Attributes:
        validation: Names in :data:`gmn_optim.tasks.tasks` of tasks on which choices are made.
        test: Names of tasks for the final figures, on which nothing is chosen.

    Example:
        >>> from gmn_optim.tasks.quadratic import QuadraticTask
        >>> class Parabolas(AbstractTaskFamily):
        ...     validation, test = ("quadratic",), ()
        ...     def sample(self, generator):
        ...         return QuadraticTask(size=int(torch.randint(1, 9, (), generator=generator)))
        >>> type(Parabolas().sample(torch.Generator())).__name__
        'QuadraticTask'
    """

    validation: tuple[str, ...]
    test: tuple[str, ...]

    @abstractmethod
    def sample(self, generator: torch.Generator) -> AbstractTask:
        """Return a task, drawn from ``generator`` alone."""


families: Registry[Callable[[], AbstractTaskFamily]] = Registry("family of tasks")
