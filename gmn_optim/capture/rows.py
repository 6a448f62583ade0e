"""Which rows (data points times positions) of a layer's factors are kept between the backward pass and the step."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gmn_optim.gradients import DecomposedGradient


class RowChoice(NamedTuple):
    """A choice of data points and of positions within each.

    Attributes:
        points: Numbers of the kept data points (k), or None for all.
        positions: Numbers of the kept positions (q), or None for all.
        scale: What backprops are multiplied by, so that their sum stays about as it was.

    Example:
        >>> choice = RowChoice(points=torch.tensor([1, 3]), positions=None, scale=2.0)
        >>> choice.of(torch.arange(8.0).view(4, 2, 1)).flatten().tolist()
        [2.0, 3.0, 6.0, 7.0]
    """

    points: Tensor | None = None
    positions: Tensor | None = None
    scale: float = 1.0

    def of(self, factor: Tensor) -> Tensor:
        """Return the kept rows of a factor (b, p, ...), a view where all are kept."""
        if self.points is not None:
            factor = factor.index_select(0, self.points)
        return factor if self.positions is None else factor.index_select(1, self.positions)

    def thin(self, gradient: DecomposedGradient) -> DecomposedGradient:
        """Return the kept rows of a gradient, its backprops scaled."""
        if self.points is None and self.positions is None:
            return gradient
        return DecomposedGradient(self.of(gradient.activations), self.of(gradient.backprops) * self.scale)


EVERY_ROW = RowChoice()
"""The choice that keeps all."""


def choose_rows(data_points: int, positions: int, rows: int | None, order: Tensor | None = None) -> RowChoice:
    """Return a choice of at most ``rows`` rows.

    Positions are thinned as much as data points are, so that few positions of many data points are kept rather than
    all of a few: tokens of one sequence resemble one another.

    Args:
        data_points: Number b.
        positions: Number p.
        rows: The most rows to keep, at least 1; None for all.
        order: Data points in an order of rank (b); those at evenly spaced ranks are kept. None for the order given.

    Example:
        >>> choice = choose_rows(8, 4, rows=16)
        >>> choice.points.tolist(), choice.positions, choice.scale
        ([1, 3, 5, 7], None, 2.0)
    """
    if rows is None or data_points * positions <= rows:
        return EVERY_ROW
    kept_points = min(data_points, max(rows // positions, math.isqrt(rows)))
    kept_positions = min(positions, max(1, rows // kept_points))
    device = None if order is None else order.device
    points = _even_ranks(data_points, kept_points, device) if kept_points < data_points else None
    if points is not None and order is not None:
        points = order[points]
    places = _even_ranks(positions, kept_positions, device) if kept_positions < positions else None
    return RowChoice(points, places, data_points * positions / (kept_points * kept_positions))


def rank_data_points(backprops: Tensor, layer_input: Tensor) -> Tensor:
    """Return the data points of backprops (b, ...) in the order of their norm (b), equal ones by that of the input."""
    order = torch.arange(len(backprops), device=backprops.device)
    for factor in (layer_input, backprops):
        if len(factor) == len(order):  # an input without an axis of data points ranks none
            norms = torch.linalg.vector_norm(factor.to(backprops.dtype).reshape(len(order), -1), dim=1)
            order = order[norms[order].argsort(stable=True)]
    return order


def _even_ranks(count: int, kept: int, device: torch.device | None) -> Tensor:
    """Return ``kept`` evenly spaced whole numbers below ``count``, in the middle of their intervals."""
    return (torch.arange(kept, device=device) * 2 + 1) * count // (2 * kept)
