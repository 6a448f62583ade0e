"""How far the pace of a controller may go: a bound that falls as training goes on, and where it may memorize."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gmn_optim.rule.matrices import Matrix

COSINE_SCALE = 10.0
"""What cosines are multiplied by: gradients that agree by more than one over this with the steps do so entirely."""

LEAST_BOUND, LEAST_AT_ALL = -1.5, -3.0
"""Steps are at least 0.22 times the nominal ones where the bound has fallen, and 0.05 times where few rows make the
gradients and have been seen again and again."""

USUAL_MATRICES, USUAL_INPUTS, INPUT_RANGE = 2, 200, (50, 500)
"""Matrices of a model, and most inputs of one of them, with which the bound falls as fast as is said; least and most,
beyond which a number of inputs counts as these."""

FREE_CONCENTRATION = 0.5
"""Up to this the bound does not mind how few rows gradients are made of."""

SHORTEST_ANNEALING = 15
"""In a data set however small the bound takes so many steps to fall by log(2)."""

FREE_EPOCHS, MOST_WEIGHT = 2.0, 30.0
"""The first times through the data concentration tells no more than of new data, then its weight grows by one for each,
up to so much more."""


@dataclass(frozen=True)
class FallingBound:
    """Settings of the bound ``b`` of the pace at step t, see :class:`gmn_optim.rule.controller.Controller`.

    Attributes:
        largest_pace: What it is at first.
        annealing: T, steps in which it falls by log(2) in the usual model, 0 for no end.
        concentration: k, what it falls by for a concentration of one beyond 0.5.
        epochs: Times through the data of a classifier in which it falls by about log(2) at least, 0 for minding none.

    Example:
        >>> bound = FallingBound(0.4, annealing=80.0)
        >>> memories = torch.zeros(1, 5)
        >>> round(bound.at(memories, 80, rate=1.0).item(), 4)
        -0.2931
    """

    largest_pace: float = 0.8
    annealing: float = 0.0
    concentration: float = 0.0
    epochs: float = 0.0

    @property
    def falls(self) -> bool:
        """Return whether it ever does."""
        return bool(self.annealing or self.concentration or self.epochs)

    def at(self, memories: Tensor, ages: Tensor | int, rate: float) -> Tensor:
        """Return the bound, () or (n).

        Args:
            memories: What a controller remembers of matrices (n, m).
            ages: Which step this is, one number or (n).
            rate: How fast it falls in this model, see :func:`annealing_rate`.
        """
        _, cosine, _, concentration, repetition = memories[:, :5].unbind(-1)
        agreement = (COSINE_SCALE * cosine.mean()).clamp(0.0, 1.0)
        share = repetition.amax() if self.epochs else torch.zeros_like(agreement)
        memorized = self.concentration * (concentration.amin() - FREE_CONCENTRATION).clamp_min(0.0)
        fallen = memorized + torch.log1p(self._times(ages, share, rate))
        bound = (self.largest_pace - fallen * (1 - agreement)).clamp_min(LEAST_BOUND)
        weight = (ages * share - FREE_EPOCHS).clamp(0.0, MOST_WEIGHT)
        return (bound - memorized * weight).clamp_min(LEAST_AT_ALL)

    def _times(self, ages: Tensor | int, share: Tensor, rate: float) -> Tensor:
        """Return steps against the time of annealing, or epochs against theirs where these are more, () or (n)."""
        steps = ages * (rate / self.annealing) if self.annealing else 0.0
        if not self.epochs:
            return share + steps  # which is zero
        # a batch of all data has no noise that would have to be averaged away
        again = ages * share / self.epochs * (1 - share).clamp_min(0.0)
        return again.clamp_max(ages / SHORTEST_ANNEALING).clamp_min(steps)


def annealing_rate(matrices: Sequence[Matrix]) -> float:
    """Return how fast the bound of the pace falls in a model, against the usual; of a table only one row acts.

    Args:
        matrices: All matrices of the model.

    Example:
        >>> from gmn_optim.rule.layout import Layout, Segment, build_chunks
        >>> layers = [Segment("0.weight", (8, 100), "0", "weight"), Segment("1.weight", (3, 8), "1", "weight")]
        >>> annealing_rate(Layout(tuple(build_chunks(layers, False))).matrices)
        0.5
    """
    low, high = INPUT_RANGE
    inputs = max((matrix.inputs for matrix in matrices if matrix.weight.role != "table"), default=USUAL_INPUTS)
    return min(max(inputs, low), high) / USUAL_INPUTS * USUAL_MATRICES / len(matrices)
