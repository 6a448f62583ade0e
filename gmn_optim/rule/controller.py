"""The controller: a learned function that speeds up and slows down each matrix, and remembers by how much."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gmn_optim.constants import constant_tensor
from gmn_optim.nn.gradmetanet import GradMetaNetConfig
from gmn_optim.rule.body import AbstractMatrixBody, MatrixChange, bodies
from gmn_optim.rule.coordinates import Coordinates
from gmn_optim.rule.features import inner_product, root
from gmn_optim.rule.look_schedule import choose
from gmn_optim.rule.matrices import Matrix
from gmn_optim.rule.nominal import LEAST_SQUARE

CHANNELS = 11

MEAN_COSINE, MEAN_RATIO, COSINE_SCALE = 4, 5, 10.0
"""Which features are means over the model, and what cosines are multiplied by."""

PROPORTION, ALLOWANCE = 0.3, 0.05
"""Weights of these features in a controller that holds the mean cosine at a value, or below where signal is strong."""

RATE = 0.1
"""The pace, a logarithm, changes by at most so much for each step."""

LEAST_PACE, LEAST_BOUND = -1.0, -1.5
"""Bounds of the pace: steps are at least 0.37 times the nominal ones, or 0.22 times once the falling bound is there."""

USUAL_MATRICES, USUAL_INPUTS, INPUT_RANGE = 2, 200, (50, 500)
"""Matrices of a model, and most inputs of one of them, with which the bound falls as fast as is said; least and most,
beyond which a number of inputs counts as these."""

RANGES = (8, 256, 64), (8, 256, 32), (1, 8, 2)
"""Least and largest inputs, outputs and number of matrices that meta-training sees, beyond which a number counts as
these, and what they are measured against."""

OUTPUT_SPEED = 2.0
"""Outputs are multiplied by this, so that a perturbation in meta-training is felt."""

ALIGNMENT_WEIGHT, NOISE_WEIGHT = 0.2, 0.1
"""Of the newest step, and of the newest look, in what is remembered; earlier ones weigh alike at first."""


@bodies.register("controller")
class Controller(AbstractMatrixBody):
    """Multiplies the step of each matrix by ``exp(pace)``, and turns the pace up or down at every look.

    Gradients that point along the steps of late say that these were too short; gradients against them, that they went
    too far; and noise hides either. The controller remembers of each matrix its pace r, a moving average of the cosine
    between gradient and steps, and one of the logarithm of signal against noise, the squared mean gradient over what it
    would be if the gradients of data points were independent with mean zero. At a look that stands for n steps,
    ``r <- r + 0.1 n tanh(f)``, where f is a linear function plus a small MLP of these, their means over the model, and
    sizes. All of it stays as it is when hidden bases are rotated, and under any order of data points. A single row
    shows no noise, and leaves the pace as it is. Before any meta-training f is zero.

    With annealing over T steps, steps are at most those of the pace ``b - log(1 + t / T')`` at step t, b being the
    largest pace and ``T' = T (n / 2) (200 / i)`` in a model of n matrices with i inputs at most: where inputs are many,
    the cosine drowns in noise and tells no longer that steps are too long. While the mean cosine is positive the bound
    is higher, and has not fallen at all from 0.1 on: such a model is still on its way.

    Args:
        width: Hidden channels of the MLP.
        gradmetanet: None.
        data_points: Has no effect.
        share: What the pace is multiplied by, 1 as meta-trained.

    Reference:
        Baydin et al. (2018), "Online learning rate adaptation with hypergradient descent", arXiv 1703.04782, for the
        product of gradient and earlier step; McCandlish et al. (2018), arXiv 1812.06162, for signal against noise.

    Example:
        >>> body = Controller(width=8, gradmetanet=None, data_points=32)
        >>> sum(parameter.numel() for parameter in body.parameters()), bool(body.output.weight.any())
        (116, False)
    """

    memory_per_matrix = 3
    takes_gradmetanet = False

    def __init__(self, width: int, gradmetanet: GradMetaNetConfig | None, data_points: int, share: float = 1.0) -> None:
        super().__init__()
        self.share, self.largest_pace, self.annealing = share, 0.8, 0.0
        self.linear = nn.Linear(CHANNELS, 1)
        self.hidden = nn.Linear(CHANNELS, width)
        self.output = nn.Linear(width, 1, bias=False)
        for parameter in (*self.linear.parameters(), *self.output.parameters()):
            nn.init.zeros_(parameter)

    def set_up(self, setpoint: float, largest_pace: float, annealing: float = 0.0) -> None:
        """Bound the pace and, with a setpoint, hold the mean cosine at minus that: faster above it, slower below.

        With annealing over so many steps the bound falls. Where the gradients of data points agree, steps that
        overshoot a little do no harm, so the cosine is held at a lower value there.
        """
        self.largest_pace, self.annealing = largest_pace, annealing
        if setpoint:
            with torch.no_grad():
                self.linear.weight[0, MEAN_COSINE], self.linear.weight[0, MEAN_RATIO] = PROPORTION, ALLOWANCE
                self.linear.bias.fill_(PROPORTION * COSINE_SCALE * setpoint)

    def forward(
        self, turned: Sequence[Coordinates], parameters: Sequence[Tensor], matrices: Sequence[Matrix], alpha: Tensor
    ) -> list[MatrixChange]:
        """Return gains () and memories (3), see :class:`AbstractMatrixBody`."""
        memories = _look(turned)
        pairs = zip(turned, parameters, strict=True)
        sizes = torch.stack([_size_features(each, own, len(matrices), alpha) for each, own in pairs])
        features = torch.cat([_controls(memories), sizes], dim=-1)
        outputs = self.linear(features) + self.output(self.hidden(features).relu())
        change = RATE * _gaps(turned, outputs) * torch.tanh(OUTPUT_SPEED * outputs.squeeze(-1))
        pace = (memories[:, 0] + change).clamp(LEAST_PACE, self.largest_pace)
        return self._changes(torch.cat([pace.unsqueeze(-1), memories[:, 1:]], dim=-1), turned, matrices)

    def hold(self, turned: Sequence[Coordinates], matrices: Sequence[Matrix]) -> list[MatrixChange]:
        """Return the gains of the newest look; cosines are followed at every step."""
        return self._changes(_align(turned), turned, matrices)

    def _changes(
        self, memories: Tensor, turned: Sequence[Coordinates], matrices: Sequence[Matrix]
    ) -> list[MatrixChange]:
        """Return what memories (n, 3) make of these among all matrices."""
        pace = memories[:, 0]
        if self.annealing:
            fallen = torch.log1p(_ages(turned) * (_annealing_rate(matrices) / self.annealing))
            agreement = (COSINE_SCALE * memories[:, 1].mean()).clamp(0.0, 1.0)
            fallen = fallen * (1 - agreement)
            pace = torch.minimum(pace, (self.largest_pace - fallen).clamp_min(LEAST_BOUND))
        gains = torch.expm1(self.share * pace)
        return [MatrixChange(*each) for each in zip(gains.unbind(), memories.unbind(), strict=True)]


def _align(turned: Sequence[Coordinates]) -> Tensor:
    """Return memories (n, 3) whose cosines have followed this step; at the first there is none."""
    pace, cosine, ratio = torch.stack([each.basis.memory for each in turned]).unbind(-1)
    now = _cosines([each.own_gradient for each in turned], [each.average for each in turned])
    weight = (1 / (_ages(turned) - 1).clamp_min(1)).clamp_min(ALIGNMENT_WEIGHT)
    cosine = torch.lerp(cosine, now, weight)
    return torch.stack([pace, torch.where(cosine.isfinite(), cosine, 0.0), ratio], dim=-1)


def _look(turned: Sequence[Coordinates]) -> Tensor:
    """Return memories (n, 3) that have followed this step, and the signal against noise of this look."""
    pace, cosine, ratio = _align(turned).unbind(-1)
    signal = torch.stack([inner_product(each.own_gradient, each.own_gradient) for each in turned])
    ages = _ages(turned)
    noise = torch.stack([_noise(each) for each in turned])
    now = _log(signal) - _log(noise)
    weight = torch.where(ages <= 1, 1.0, (1 / ages).clamp_min(NOISE_WEIGHT))
    weight = torch.where((_gaps(turned, now) > 0) & now.isfinite(), weight, 0.0)
    ratio = torch.lerp(ratio, now.nan_to_num(0.0).clamp(-4.0, 6.0), weight)
    return torch.stack([pace, cosine, ratio], dim=-1)


def _ages(turned: Sequence[Coordinates]) -> Tensor:
    """Return the ages of the bases (n)."""
    return torch.stack([each.basis.age for each in turned])


def _gaps(turned: Sequence[Coordinates], like: Tensor) -> Tensor:
    """Return how many steps this look stands for (n), 0 at a single row, which shows no noise."""
    gaps = [
        choose(each.look.follows, each.look.gap, 0.0) if each.rows.backprops.shape[-2] > 1 else 0.0 for each in turned
    ]
    return torch.stack([torch.as_tensor(gap, dtype=like.dtype, device=like.device) for gap in gaps])


def _noise(each: Coordinates) -> Tensor:
    """Return the sum over rows of squared gradients ()."""
    return (each.rows.activations.square().sum(-1) * each.rows.backprops.square().sum(-1)).sum()


def _controls(memories: Tensor) -> Tensor:
    """Return features of memories (n, 3) and of their means (n, 6)."""
    scaled = memories * constant_tensor((0.5, COSINE_SCALE, 0.5), memories.dtype, memories.device)
    return torch.cat([scaled, scaled.mean(0, keepdim=True).expand_as(scaled)], dim=-1)


def _size_features(each: Coordinates, parameters: Tensor, matrices: int, alpha: Tensor) -> Tensor:
    """Return features of a matrix's sizes (5): sides, number of matrices, weights, and steps of late against them."""
    outputs, inputs = each.step.shape[-2:]
    square = inner_product(parameters, parameters) / parameters.numel()
    sides = [
        math.log(min(max(n, low), high) / reference)
        for n, (low, high, reference) in zip((inputs, outputs, matrices), RANGES, strict=True)
    ]
    weights = _log(square) + math.log(inputs)
    late = inner_product(each.average, each.average) / each.average.numel()
    moved = 2 * alpha.log() + _log(late) - _log(square) + 6.0
    logs = constant_tensor(tuple(sides), square.dtype, square.device)
    return 0.5 * torch.cat([logs, torch.stack([weights, moved]).clamp(-8.0, 8.0)])


def _log(squares: Tensor) -> Tensor:
    """Return the logarithm, finite at zero."""
    return squares.clamp_min(LEAST_SQUARE).log()


def _cosines(ones: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """Return the cosines of pairs of tensors as vectors (n), 0 where either is zero."""
    pairs = zip((*ones, *ones, *others), (*others, *ones, *others), strict=True)
    products, *squares = torch.stack([inner_product(*pair) for pair in pairs]).view(3, -1).unbind()
    lengths = root(torch.stack(squares))
    return products / (lengths[0] * lengths[1]).clamp_min(LEAST_SQUARE)


def _annealing_rate(matrices: Sequence[Matrix]) -> float:
    """Return how fast the bound of the pace falls in a model, against the usual; of a table only one row acts."""
    low, high = INPUT_RANGE
    inputs = max((matrix.inputs for matrix in matrices if matrix.weight.role != "table"), default=USUAL_INPUTS)
    return min(max(inputs, low), high) / USUAL_INPUTS * USUAL_MATRICES / len(matrices)
