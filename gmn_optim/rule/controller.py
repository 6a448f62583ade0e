"""The controller: a learned function that speeds up and slows down each matrix, and remembers by how much."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gmn_optim.constants import constant_tensor
from gmn_optim.nn.gradmetanet import GradMetaNetConfig
from gmn_optim.rule.body import AbstractMatrixBody, MatrixChange, bodies
from gmn_optim.rule.coordinates import Coordinates
from gmn_optim.rule.falling_bound import COSINE_SCALE, FallingBound, annealing_rate
from gmn_optim.rule.features import inner_products, lengths, root
from gmn_optim.rule.look_schedule import choose
from gmn_optim.rule.matrices import Matrix
from gmn_optim.rule.nominal import LEAST_SQUARE
from gmn_optim.rule.repeated_rows import KEPT_ROWS, fingerprints, follow_rows, softmax_of_labels
from gmn_optim.rule.scalars import SPEED

CHANNELS = 13

MEAN_COSINE, MEAN_RATIO = 5, 6
"""Which features are means over the model."""

PROPORTION, ALLOWANCE = 0.3, 0.05
"""Weights of these features in a controller that holds the mean cosine at a value, or below where signal is strong."""

RATE = 0.1
"""The pace, a logarithm, changes by at most so much for each step."""

LEAST_PACE = -1.0
"""Least pace: steps are at least 0.37 times the nominal ones, unless a falling bound is lower."""

MOST_CONCENTRATION = 10.0
"""More counts as this."""

RANGES = (8, 256, 64), (8, 256, 32), (1, 8, 2)
"""Least and largest inputs, outputs and number of matrices that meta-training sees, beyond which a number counts as
these, and what they are measured against."""

OUTPUT_SPEED = 2.0
"""Outputs are multiplied by this, so that a perturbation in meta-training is felt."""

ALIGNMENT_WEIGHT, NOISE_WEIGHT, CONCENTRATION_WEIGHT, REPETITION_WEIGHT = 0.2, 0.1, 0.2, 0.05
"""Of the newest step, and of the newest look, in what is remembered; earlier ones weigh alike at first."""

OF_TRAINING = 5
"""Numbers that are remembered of a matrix besides rows of the first look."""


@bodies.register("controller")
class Controller(AbstractMatrixBody):
    """Multiplies the step of each matrix by ``exp(pace)``, and turns the pace up or down at every look.

    Gradients that point along the steps of late say that these were too short; gradients against them, that they went
    too far; and noise hides either. The controller remembers of each matrix its pace r and moving averages of four
    things: the cosine between gradient and steps; the logarithm of signal against noise, the squared mean gradient over
    what it would be if the gradients of rows were independent with mean zero; the concentration, minus the logarithm of
    the share of rows that gradients are made of, ``(sum n)^2 / (r sum n^2)`` of the norms n of r rows; and the
    repetition, how often a row of the first look stands in a later one, if a layer's backprops are those of a softmax
    with labels: in the first layer of such a classifier that is the share of the data set that is looked at. At
    a look that stands for m steps, ``r <- r + 0.1 m tanh(f)``, where f is a linear function plus a small MLP of the
    first four, their means over the model, and sizes. All of it stays as it is when hidden bases are rotated, and under
    any order of data points. A single row shows no noise, and leaves the pace as it is. Steps are taken at the pace
    ``r0 + r``, with a learned r0. Before any meta-training f and r0 are zero.

    With annealing over T steps, steps are at most those of the pace ``b - log(1 + t / T')`` at step t, b being the
    largest pace and ``T' = T (n / 2) (200 / i)`` in a model of n matrices with i inputs at most: where inputs are many,
    the cosine drowns in noise and tells no longer that steps are too long. While the mean cosine is positive the bound
    is higher, and has not fallen at all from 0.1 on: such a model is still on its way. It also falls by ``k (c - 0.5)``
    for a concentration c beyond 0.5, the least one of all matrices (0 of one that only ever saw single rows). The few
    data points that a classifier has not learned yet are what it memorizes next, and their gradient is as noisy as
    that of a small batch.

    With epochs E the bound minds how often data were seen, ``n = t p`` times for the largest repetition p of a matrix:
    ``t / T'`` counts as ``n (1 - p) / E`` at least (or as ``t / 15`` if that is less), and beyond the second time the
    bound falls further, to a pace of -3 at most, by ``k (c - 0.5) (n - 2)`` up to n = 32. That it does whether or not
    gradients agree with the steps, since they do in what is memorized, too. Where many rows are captured, part of a
    batch is looked at, and times are counted too few. Nothing is counted in regressions, in which to fit each data
    point is often what is wanted, nor where inputs are never the same (augmented, or behind other layers).

    Args:
        width: Hidden channels of the MLP.
        gradmetanet: None.
        data_points: Has no effect.
        share: What the pace is multiplied by, 1 as meta-trained.

    Reference:
        Baydin et al. (2018), "Online learning rate adaptation with hypergradient descent", arXiv 1703.04782, for the
        product of gradient and earlier step; McCandlish et al. (2018), arXiv 1812.06162, for signal against noise; Kish
        (1965), "Survey sampling", for the share of rows, his effective sample size.

    Example:
        >>> body = Controller(width=8, gradmetanet=None, data_points=32)
        >>> sum(parameter.numel() for parameter in body.parameters()), bool(body.output.weight.any())
        (135, False)
    """

    memory_per_matrix = OF_TRAINING + KEPT_ROWS
    takes_gradmetanet = False

    def __init__(self, width: int, gradmetanet: GradMetaNetConfig | None, data_points: int, share: float = 1.0) -> None:
        super().__init__()
        self.share, self.bound = share, FallingBound()
        self.linear = nn.Linear(CHANNELS, 1)
        self.hidden = nn.Linear(CHANNELS, width)
        self.output = nn.Linear(width, 1, bias=False)
        for parameter in (*self.linear.parameters(), *self.output.parameters()):
            nn.init.zeros_(parameter)
        self.first_pace = nn.Parameter(torch.zeros(()))

    def set_up(self, setpoint: float, bound: FallingBound) -> None:
        """Bound the pace and, with a setpoint, hold the mean cosine at minus that: faster above it, slower below.

        Where the gradients of data points agree, steps that overshoot a little do no harm, so the cosine is held at a
        lower value there.
        """
        self.bound = bound
        if setpoint:
            with torch.no_grad():
                self.linear.weight[0, MEAN_COSINE], self.linear.weight[0, MEAN_RATIO] = PROPORTION, ALLOWANCE
                self.linear.bias.fill_(PROPORTION * COSINE_SCALE * setpoint)

    def forward(
        self, turned: Sequence[Coordinates], parameters: Sequence[Tensor], matrices: Sequence[Matrix], alpha: Tensor
    ) -> list[MatrixChange]:
        """Return gains () and memories (m), see :class:`AbstractMatrixBody`."""
        memories = _look(turned)
        pairs = zip(turned, parameters, strict=True)
        sizes = torch.stack([_size_features(each, own, len(matrices), alpha) for each, own in pairs])
        features = torch.cat([_controls(memories[:, :4]), sizes], dim=-1)
        outputs = self.linear(features) + self.output(self.hidden(features).relu())
        change = RATE * _gaps(turned, outputs) * torch.tanh(OUTPUT_SPEED * outputs.squeeze(-1))
        pace = (memories[:, 0] + change).clamp(LEAST_PACE, self.bound.largest_pace)
        return self._changes(torch.cat([pace.unsqueeze(-1), memories[:, 1:]], dim=-1), turned, matrices)

    def hold(self, turned: Sequence[Coordinates], matrices: Sequence[Matrix]) -> list[MatrixChange]:
        """Return the gains of the newest look; cosines are followed at every step."""
        return self._changes(_align(turned), turned, matrices)

    def _changes(
        self, memories: Tensor, turned: Sequence[Coordinates], matrices: Sequence[Matrix]
    ) -> list[MatrixChange]:
        """Return what memories (n, m) make of these among all matrices."""
        pace = (SPEED * self.first_pace + memories[:, 0]).clamp_max(self.bound.largest_pace)
        if self.bound.falls:
            pace = torch.minimum(pace, self.bound.at(memories, _ages(turned), annealing_rate(matrices)))
        gains = torch.expm1(self.share * pace)
        return [MatrixChange(*each) for each in zip(gains.unbind(), memories.unbind(), strict=True)]


def _align(turned: Sequence[Coordinates]) -> Tensor:
    """Return memories (n, m) whose cosines have followed this step; at the first there is none."""
    memories = torch.stack([each.basis.memory for each in turned])
    pace, cosine = memories[:, :2].unbind(-1)
    now = _cosines([each.own_gradient for each in turned], [each.average for each in turned])
    cosine = torch.lerp(cosine, now, _weight(_ages(turned) - 1, ALIGNMENT_WEIGHT))
    followed = torch.stack([pace, torch.where(cosine.isfinite(), cosine, 0.0)], dim=-1)
    return torch.cat([followed, memories[:, 2:]], dim=-1)


def _look(turned: Sequence[Coordinates]) -> Tensor:
    """Return memories (n, m) that have followed this step, and the rows of this look."""
    memories, ages = _align(turned), _ages(turned)
    pace, cosine, ratio, concentration, repetition = memories[:, :OF_TRAINING].unbind(-1)
    signal = lengths([each.own_gradient for each in turned]).square()
    noise, share = torch.stack([_noise_and_share(each) for each in turned]).unbind(-1)
    seen = (_gaps(turned, ratio) > 0).to(ratio.dtype)
    ratio = _follow(ratio, _log(signal) - _log(noise), (-4.0, 6.0), seen * _weight(ages, NOISE_WEIGHT))
    weight = seen * (share > 0) * _weight(ages, CONCENTRATION_WEIGHT)
    concentration = _follow(concentration, -_log(share), (0.0, MOST_CONCENTRATION), weight)
    kept, times = _rows_seen(memories[:, OF_TRAINING:], turned)
    repetition = torch.lerp(repetition, times, seen * _weight(ages - 1, REPETITION_WEIGHT))
    rows = torch.where(seen.unsqueeze(-1) > 0, kept, memories[:, OF_TRAINING:])
    return torch.cat([torch.stack([pace, cosine, ratio, concentration, repetition], dim=-1), rows], dim=-1)


def _rows_seen(old: Tensor, turned: Sequence[Coordinates]) -> tuple[Tensor, Tensor]:
    """Return what is remembered of rows (n, 64), and how often one is seen in this look of a classifier (n)."""
    on_host = all(each.age is not None for each in turned)
    # without the 1 of the bias, with which a row of zeros would be one
    now = [fingerprints(each.rows.activations[..., : each.matrix.inputs]) for each in turned]
    kept, times = follow_rows(old, now, on_host)
    if on_host and times.device.type == "cpu" and not times.any():
        return kept, times
    return kept, times * torch.stack([softmax_of_labels(each.rows.backprops) for each in turned]).any()


def _follow(average: Tensor, now: Tensor, bounds: tuple[float, float], weight: Tensor) -> Tensor:
    """Return moving averages (n) after this look within bounds, which weighs so much (n), nothing if not finite."""
    return torch.lerp(average, now.nan_to_num(0.0).clamp(*bounds), weight * now.isfinite())


def _weight(number: Tensor | int, least: float) -> Tensor | float:
    """Return the weight of the newest of so many (n), which weigh alike until it is the least."""
    if isinstance(number, Tensor):
        return (1 / number.clamp_min(1)).clamp_min(least)
    return max(1 / max(number, 1), least)


def _ages(turned: Sequence[Coordinates]) -> Tensor | int:
    """Return the ages of the bases (n), one number where the host knows it."""
    known = turned[0].age
    return torch.stack([each.basis.age for each in turned]) if known is None else known


def _gaps(turned: Sequence[Coordinates], like: Tensor) -> Tensor:
    """Return how many steps this look stands for (n), 0 at a single row, which shows no noise."""
    gaps = [
        choose(each.look.follows, each.look.gap, 0.0) if each.rows.backprops.shape[-2] > 1 else 0.0 for each in turned
    ]
    return torch.stack([torch.as_tensor(gap, dtype=like.dtype, device=like.device) for gap in gaps])


def _noise_and_share(each: Coordinates) -> Tensor:
    """Return the sum over rows of squared gradients, and the share of rows that gradients are made of (2)."""
    squares = each.rows.activations.square().sum(-1) * each.rows.backprops.square().sum(-1)
    noise, norms = squares.sum(), root(squares / squares.amax().clamp_min(LEAST_SQUARE))
    share = norms.sum().square() / (norms.numel() * norms.square().sum()).clamp_min(LEAST_SQUARE)
    return torch.stack([noise, share])


def _controls(memories: Tensor) -> Tensor:
    """Return features of memories (n, 4) and of their means (n, 8)."""
    scaled = memories * constant_tensor((0.5, COSINE_SCALE, 0.5, 0.5), memories.dtype, memories.device)
    return torch.cat([scaled, scaled.mean(0, keepdim=True).expand_as(scaled)], dim=-1)


def _size_features(each: Coordinates, parameters: Tensor, matrices: int, alpha: Tensor) -> Tensor:
    """Return features of a matrix's sizes (5): sides, number of matrices, weights, and steps of late against them."""
    outputs, inputs = each.step.shape[-2:]
    square = torch.linalg.vector_norm(parameters).square() / parameters.numel()
    sides = [
        math.log(min(max(n, low), high) / reference)
        for n, (low, high, reference) in zip((inputs, outputs, matrices), RANGES, strict=True)
    ]
    weights = _log(square) + math.log(inputs)
    late = lengths([each.average])[0].square() / each.step.numel()
    moved = 2 * alpha.log() + _log(late) - _log(square) + 6.0
    logs = constant_tensor(tuple(sides), square.dtype, square.device)
    return 0.5 * torch.cat([logs, torch.stack([weights, moved]).clamp(-8.0, 8.0)])


def _log(squares: Tensor) -> Tensor:
    """Return the logarithm, finite at zero."""
    return squares.clamp_min(LEAST_SQUARE).log()


def _cosines(ones: Sequence[Sequence[Tensor]], others: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the cosines of pairs of vectors in parts (n), 0 where either is zero."""
    both = lengths(ones) * lengths(others)  # of which one may have vanished where the product has not
    return torch.where(both > 0, inner_products(ones, others) / both.clamp_min(LEAST_SQUARE), 0.0)
