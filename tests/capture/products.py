"""What tests of products in the graph share."""

import torch
from torch import Tensor

from gmn_optim.capture.graph import MatrixUse, ParameterUses
from gmn_optim.capture.graph_rows import Rows, count_data_points, fold_rows, hook_rows, widen_block
from gmn_optim.gradients import DecomposedGradient

Watched = list[tuple[MatrixUse, list[Rows | None]]]


def watch(uses: ParameterUses) -> Watched:
    """Hook all products and return each with the list that its rows will be in."""
    found: Watched = [(use, []) for use in uses.products]
    for use, rows in found:
        hook_rows(use, rows.append)
    return found


def factors_of(use: MatrixUse, rows: Rows) -> DecomposedGradient:
    """Return factors of the whole weight, data points by the shape that the search found."""
    return widen_block(fold_rows(rows, count_data_points(use)), use.block)


def total(found: Watched, weight: Tensor) -> Tensor:
    """Add up what all uses of a weight leave."""
    parts = [factors_of(use, each) for use, rows in found if use.weight is weight for each in rows]
    return sum(part.sum_of_outer_products() for part in parts).view_as(weight)


def close(found: Tensor, expected: Tensor) -> None:
    """Compare to float64's precision."""
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
