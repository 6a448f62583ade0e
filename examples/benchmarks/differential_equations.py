"""Networks that solve differential equations (PINNs): GMNOptimizer against tuned optimizers, side by side.

    python examples/benchmarks/differential_equations.py --equations poisson burgers --out equations

Their losses hold derivatives of the network, which the factors of single data points do not explain: the default
weights leave them to their nominal term, whose bases come from the gradient itself. The loss that is measured is that
of the equation and its conditions, at points that training did not see. Tables, all figures as JSON and pictures go
into a folder; a comparison that was stopped goes on by the same command.
"""

import argparse
import math
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from gmn_optim import CaptureWarning
from gmn_optim.comparison import Protocol, compare
from gmn_optim.tasks import AbstractTask

ARMS = ("adam", "adamw-cosine", "soap", "muon", "kronecker_schedule_free-untuned", "gmn")

Field = Callable[[Tensor], Tensor]


def derivatives(field: Field, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a field (n), its first derivatives and its second ones without mixed ones (n, d) at points (n, d)."""
    points = points.detach().requires_grad_()
    values = field(points)
    (first,) = torch.autograd.grad(values.sum(), points, create_graph=True)
    columns = [torch.autograd.grad(first[:, k].sum(), points, create_graph=True)[0][:, k] for k in range(2)]
    return values, first, torch.stack(columns, dim=-1)


def poisson(field: Field, inside: Tensor, edge: Tensor) -> Tensor:
    """Return the loss of ``u_xx + u_yy = -2 pi^2 sin(pi x) sin(pi y)`` on the unit square, 0 at its border."""
    _, _, second = derivatives(field, inside)
    source = -2 * math.pi**2 * torch.sin(math.pi * inside).prod(-1)
    sides = (4 * edge[:, 0]).floor()  # which side a point is moved to
    border = torch.stack([torch.where(sides < 2, sides, edge[:, 1]), torch.where(sides < 2, edge[:, 1], sides - 2)], -1)
    return (second.sum(-1) - source).square().mean() + 100 * field(border).square().mean()


def burgers(field: Field, inside: Tensor, edge: Tensor) -> Tensor:
    """Return the loss of ``u_t + u u_x = 0.02 u_xx`` for x in [-1, 1], from ``-sin(pi x)`` at t = 0, 0 at both ends."""
    inside = inside * inside.new_tensor([2.0, 1.0]) - inside.new_tensor([1.0, 0.0])
    values, first, second = derivatives(field, inside)
    residual = first[:, 1] + values * first[:, 0] - 0.02 * second[:, 0]
    x = 2 * edge[:, 0] - 1
    start = field(torch.stack([x, torch.zeros_like(x)], -1)) + torch.sin(math.pi * x)
    ends = field(torch.stack([x.sign(), edge[:, 1]], -1))
    return residual.square().mean() + 10 * start.square().mean() + 10 * ends.square().mean()


def allen_cahn(field: Field, inside: Tensor, edge: Tensor) -> Tensor:
    """Return the loss of ``u_t = 0.01 u_xx + u - u^3`` for x in [-1, 1], from ``x^2 cos(pi x)`` at t = 0."""
    inside = inside * inside.new_tensor([2.0, 1.0]) - inside.new_tensor([1.0, 0.0])
    values, first, second = derivatives(field, inside)
    residual = first[:, 1] - 0.01 * second[:, 0] + values**3 - values
    x = 2 * edge[:, 0] - 1
    start = field(torch.stack([x, torch.zeros_like(x)], -1)) - x.square() * torch.cos(math.pi * x)
    return residual.square().mean() + 10 * start.square().mean()


def transport(field: Field, inside: Tensor, edge: Tensor) -> Tensor:
    """Return the loss of ``u_t + u_x = 0.05 u_xx`` on the unit square, from a bump at t = 0, periodic in x."""
    _, first, second = derivatives(field, inside)
    residual = first[:, 1] + first[:, 0] - 0.05 * second[:, 0]
    x, t, zeros = edge[:, 0], edge[:, 1], torch.zeros_like(edge[:, 0])
    start = field(torch.stack([x, zeros], -1)) - torch.exp(-50 * (x - 0.3).square())
    wrap = field(torch.stack([zeros, t], -1)) - field(torch.stack([zeros + 1, t], -1))
    return residual.square().mean() + 10 * start.square().mean() + 10 * wrap.square().mean()


class EquationTask(AbstractTask):
    """A tanh network that solves an equation at random points; for comparisons, not for meta-training.

    Args:
        equation: Loss of a field at points inside and at points that it moves to borders, both in the unit square.
        hidden: Widths of the hidden layers.
        horizon: Steps of a training.
        points: Inside, in a batch; half as many are for borders.
    """

    loss_limit = 1e4

    def __init__(
        self,
        equation: Callable[[Field, Tensor, Tensor], Tensor],
        hidden: Sequence[int],
        horizon: int,
        points: int = 128,
    ) -> None:
        widths = [2, *hidden]
        pairs = zip(widths, widths[1:], strict=False)
        layers = [layer for pair in pairs for layer in (nn.Linear(*pair), nn.Tanh())]
        self.module = nn.Sequential(*layers, nn.Linear(widths[-1], 1))
        self.equation, self.horizon, self.points = equation, horizon, points

    def init_parameters(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Return weights as Glorot and Bengio (2010) draw them, and biases of zero."""
        return {
            name: torch.zeros(value.shape)
            if value.dim() == 1
            else nn.init.xavier_normal_(torch.empty(value.shape), generator=generator)
            for name, value in self.module.named_parameters()
        }

    def sample_batch(self, generator: torch.Generator, shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """Return points inside and points for borders."""
        counts = self.points, self.points // 2
        return tuple(torch.rand(*shape, count, 2, generator=generator) for count in counts)

    @torch.enable_grad()
    def loss(self, parameters: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss of the equation."""

        def field(points: Tensor) -> Tensor:
            return torch.func.functional_call(self.module, parameters, (points,)).squeeze(-1)

        return self.equation(field, *batch)

    def held_out(self, split: str) -> tuple[Tensor, Tensor]:
        """Return a thousand points of each kind."""
        generator = torch.Generator().manual_seed({"train": 0, "validation": 1, "test": 2}[split])
        return torch.rand(1_000, 2, generator=generator), torch.rand(1_000, 2, generator=generator)


def make_tasks(horizon: int) -> dict[str, AbstractTask]:
    """Return the tasks."""
    return {
        "poisson": EquationTask(poisson, (32, 32, 32), horizon),
        "burgers": EquationTask(burgers, (32, 32, 32), horizon),
        "transport": EquationTask(transport, (40, 40, 40), horizon),
        "allen-cahn": EquationTask(allen_cahn, (48, 48), horizon),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--equations", nargs="+", choices=[*make_tasks(1)], default=[*make_tasks(1)])
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", nargs="+", default=ARMS)
    parser.add_argument("--out", type=Path, help="folder; by default nothing is kept")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see whether it runs")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore", CaptureWarning)  # that factors do not explain these gradients is the point
    steps, seeds, arms = (2, 1, ("adam", "gmn")) if options.smoke else (options.steps, options.seeds, options.arms)
    protocol = Protocol(seeds=seeds, tuning_seeds=1, every=min(20, steps), rounds=0 if options.smoke else 3)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or Path(scratch)
        made = {name: task for name, task in make_tasks(steps).items() if name in options.equations}
        print(compare(made, arms, folder=folder, protocol=protocol, progress=not options.smoke))


if __name__ == "__main__":
    main()
