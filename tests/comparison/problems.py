"""Tasks small enough for tests of comparisons."""

import torch
from torch import Tensor, nn

from gmn_optim.tasks.base import AbstractTask, Batch, Parameters


class TeacherTask(AbstractTask):
    """Regression onto a fixed random network, by a network with a convolution, a norm, and two linear layers."""

    def __init__(self, batch_size: int = 16, horizon: int = 60) -> None:
        self.module = nn.Sequential(
            *(nn.Conv1d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(15, 8), nn.LayerNorm(8), nn.Tanh()),
            nn.Linear(8, 2),
        )
        self.horizon, self.loss_limit, self.batch_size = horizon, 100.0, batch_size
        self._teacher = torch.randn(5, 2, generator=torch.Generator().manual_seed(7))

    def init_parameters(self, generator: torch.Generator) -> Parameters:
        """Return weights of about unit gain, scales of one."""
        return {
            name: torch.ones_like(value) if name == "4.weight" else 0.3 * torch.randn(value.shape, generator=generator)
            for name, value in self.module.named_parameters()
        }

    def sample_batch(self, generator: torch.Generator, shape: tuple[int, ...] = ()) -> Batch:
        """Return inputs (*shape, b, 1, 5) and targets (*shape, b, 2)."""
        inputs = torch.randn((*shape, self.batch_size, 1, 5), generator=generator)
        return inputs, torch.tanh(inputs.squeeze(-2) @ self._teacher)

    def loss(self, parameters: Parameters, batch: Batch) -> Tensor:
        """Return the mean squared error ()."""
        inputs, targets = batch
        return nn.functional.mse_loss(torch.func.functional_call(self.module, parameters, (inputs,)), targets)


class NextTokenTask(AbstractTask):
    """Guess the token that follows by a fixed rule, with an embedding, a norm, an MLP and a head."""

    def __init__(self, tokens: int = 6, width: int = 8) -> None:
        self.module = nn.Sequential(
            *(nn.Embedding(tokens, width), nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU()),
            *(nn.Linear(2 * width, width), nn.Linear(width, tokens, bias=False)),
        )
        self.horizon, self.loss_limit, self._tokens = 60, 10.0, tokens

    def init_parameters(self, generator: torch.Generator) -> Parameters:
        """Return weights of about unit gain, scales of one."""
        return {
            name: torch.ones_like(value) if name == "1.weight" else 0.3 * torch.randn(value.shape, generator=generator)
            for name, value in self.module.named_parameters()
        }

    def sample_batch(self, generator: torch.Generator, shape: tuple[int, ...] = ()) -> Batch:
        """Return tokens (*shape, 8, 5) and those that follow them."""
        tokens = torch.randint(self._tokens, (*shape, 8, 5), generator=generator)
        return tokens, (tokens + 2) % self._tokens

    def loss(self, parameters: Parameters, batch: Batch) -> Tensor:
        """Return the mean cross-entropy ()."""
        tokens, following = batch
        logits = torch.func.functional_call(self.module, parameters, (tokens,))
        return nn.functional.cross_entropy(logits.flatten(0, -2), following.flatten())
