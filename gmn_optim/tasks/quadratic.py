"""A noisy quadratic whose loss, gradient and meta-gradient are known exactly."""

import torch
from torch import Tensor, nn

from gmn_optim.tasks.base import AbstractTask, Batch, Parameters, tasks


class _Point(nn.Module):
    """A parameter that is its own output."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(size, dtype=dtype))

    def forward(self) -> Tensor:
        """Return the point (size)."""
        return self.x


@tasks.register("quadratic")
class QuadraticTask(AbstractTask):
    """``1/2 sum_j c_j (x_j - n_j)^2`` from x = 1, curvatures c from 1 to ``condition``, n noise of each batch.

    Args:
        size: Number of coordinates.
        condition: Largest curvature.
        noise: Standard deviation of n.
        horizon: Steps of a full training.
        dtype: Of the parameters and batches.

    Example:
        >>> task = QuadraticTask(size=2, condition=4.0, noise=0.0)
        >>> generator = torch.Generator()
        >>> round(task.loss(task.init_parameters(generator), task.sample_batch(generator)).item(), 4)
        2.5
    """

    def __init__(
        self,
        size: int = 2,
        condition: float = 10.0,
        noise: float = 0.1,
        horizon: int = 20,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.module = _Point(size, dtype)
        self.curvatures = torch.logspace(0.0, torch.tensor(condition).log10().item(), size, dtype=dtype)
        self.noise = noise
        self.horizon = horizon
        self.loss_limit = 1e6

    def init_parameters(self, generator: torch.Generator) -> Parameters:
        """Return the point of ones."""
        return {"x": torch.ones_like(self.curvatures)}

    def sample_batch(self, generator: torch.Generator, shape: tuple[int, ...] = ()) -> Batch:
        """Return the noise of a step (*shape, size)."""
        size = (*shape, self.curvatures.numel())
        return (self.noise * torch.randn(size, generator=generator, dtype=self.curvatures.dtype),)

    def loss(self, parameters: Parameters, batch: Batch) -> Tensor:
        """Return the loss ()."""
        return 0.5 * (self.curvatures * (parameters["x"] - batch[0]).square()).sum()
