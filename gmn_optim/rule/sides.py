"""The basis of one side of a matrix: all eigenvectors of a short side, the leading ones of a long side.

Of a side of n entries up to :data:`FULL_SIDE`, basis and second moment are square. A longer one has an orthogonal
matrix ``Q = I + A B^T`` with A and B (n, 2k), kept side by side (n, 4k): k of its columns are the leading eigenvectors,
each in the place of an entry that has much of them, and all others are as close to the axes as that allows. Its second
moment is kept as the leading part of a root (n, :data:`SKETCH`), so that no cost grows with the square of the side.
"""

import torch
from torch import Tensor

from gmn_optim.rule.features import root

FULL_SIDE = 200
"""A longer side has leading eigenvectors alone: the cost of all of them grows with the square of the side and more."""

LEADING, SKETCH = 8, 16
"""Leading eigenvectors of a long side; directions in which its second moment is remembered."""

SKETCH_ROWS = 16
"""Rows of factors, at evenly spaced ranks of their norm, that a look adds to the second moment of a long side."""

TINY = 1e-30
"""What is divided by is at least this, so that zeros stay zeros."""


def init_side(groups: int, n: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the axes as the basis of a side, and its second moment, zero.

    Example:
        >>> [tuple(each.shape) for each in init_side(1, 3, torch.zeros(()))]
        [(1, 3, 3), (1, 3, 3)]
    """
    if n > FULL_SIDE:
        return like.new_zeros(groups, n, 4 * LEADING), like.new_zeros(groups, n, SKETCH)
    axes = torch.eye(n, dtype=like.dtype, device=like.device).repeat(groups, 1, 1)
    return axes, torch.zeros_like(axes)


def is_square(side: Tensor) -> bool:
    """Return whether a basis holds all eigenvectors."""
    return side.shape[-1] == side.shape[-2]


def turn(side: Tensor, values: Tensor) -> Tensor:
    """Return rows (groups, r, n) in the coordinates of a side's basis, ``values Q``.

    Example:
        >>> side = init_side(1, 400, torch.zeros(()))[0]
        >>> torch.equal(turn(side, torch.ones(1, 2, 400)), torch.ones(1, 2, 400))
        True
    """
    if is_square(side):
        return torch.bmm(values, side)
    left, right = side.chunk(2, dim=-1)
    return values + (values @ left) @ right.mT


def turn_back(side: Tensor, values: Tensor) -> Tensor:
    """Return rows (groups, r, n) that are given in the coordinates of a side's basis, ``values Q^T``."""
    if is_square(side):
        return torch.bmm(values, side.mT)
    left, right = side.chunk(2, dim=-1)
    return values + (values @ right) @ left.mT


def turn_columns(side: Tensor, values: Tensor) -> Tensor:
    """Return columns (groups, n, c) in the coordinates of a side's basis, ``Q^T values``.

    The same as :meth:`turn` of the transpose, but the result lies in memory as later steps read it.
    """
    if is_square(side):
        return torch.bmm(side.mT, values)
    left, right = side.chunk(2, dim=-1)
    return values + right @ (left.mT @ values)


def turn_columns_back(side: Tensor, values: Tensor) -> Tensor:
    """Return columns (groups, n, c) that are given in the coordinates of a side's basis, ``Q values``."""
    if is_square(side):
        return torch.bmm(side, values)
    left, right = side.chunk(2, dim=-1)
    return values + left @ (right.mT @ values)


def second_moment(rows: Tensor) -> Tensor:
    """Return the sum of the outer products of rows (groups, r, n), with mean diagonal 1, or a root of it.

    Rows are divided by their largest element first, so that no square over- or underflows.

    Example:
        >>> second_moment(torch.tensor([[[3.0, 0.0]]]))
        tensor([[[2., 0.],
                 [0., 0.]]])
    """
    if rows.shape[-1] > FULL_SIDE:
        kept = _scaled(_evenly_ranked(rows))
        return kept.mT / root(kept.square().sum((-2, -1), keepdim=True) / rows.shape[-1]).clamp_min(TINY)
    scaled = _scaled(rows)
    moment = scaled.mT @ scaled
    return moment / moment.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(TINY)[..., None, None]


def follow_moment(average: Tensor, moment: Tensor, decay: Tensor | float) -> Tensor:
    """Return a moving average one step on; what is not finite is left out."""
    finite = moment.sum((-2, -1), keepdim=True).isfinite()
    if average.shape[-2] <= FULL_SIDE:
        return torch.where(finite, torch.lerp(moment, average, decay), average).detach()
    decay = torch.as_tensor(decay, dtype=average.dtype, device=average.device)
    moment = torch.where(finite, moment, torch.zeros_like(moment)).detach()
    both = torch.cat([decay.sqrt() * average, (1 - decay).sqrt() * moment], dim=-1)
    directions = eigenvectors(both.mT @ both)[..., -SKETCH:].flip(-1)
    return torch.where(finite & (decay < 1), both @ directions, average).detach()


def eigenvectors(moment: Tensor) -> Tensor:
    """Return the eigenvectors of a second moment as columns, those with the largest eigenvalues last."""
    try:
        return torch.linalg.eigh(moment)[1]
    except torch.linalg.LinAlgError:  # in float32 the algorithm may fail on repeated eigenvalues
        return torch.linalg.eigh(moment.double())[1].to(moment.dtype)


def leading_basis(moment: Tensor) -> Tensor:
    """Return the basis of a long side (groups, n, 4k) from the root of its second moment (groups, n, m).

    The k entries with the most of the leading eigenvectors U give them their places. With U_P the part of U there and
    its polar form ``U_P = -H R``, the columns of ``Z = U R^T`` differ from U by a rotation alone, and
    ``I - (Z - E_P) (I + H)^-1 (Z - E_P)^T`` is orthogonal and maps the axes of these places to Z (a block reflection,
    as in Schreiber and Parlett 1988, "Block reflectors: theory and computation"). Neither signs of eigenvectors nor
    the order of entries matter.

    Example:
        >>> side = leading_basis(torch.randn(1, 400, 24))
        >>> turned = turn(side, torch.eye(400)[None])
        >>> torch.allclose(turned @ turned.mT, torch.eye(400), atol=1e-5)
        True
    """
    leading = moment[..., :LEADING]
    lengths = root(leading.square().sum(-2, keepdim=True))
    u = torch.linalg.qr(leading / lengths.clamp_min(TINY))[0]
    places = u.square().sum(-1).topk(LEADING, dim=-1)[1]
    axes = torch.nn.functional.one_hot(places, u.shape[-2]).to(u.dtype).mT
    x, sizes, y = torch.linalg.svd(axes.mT @ u)
    z = -u @ (x @ y).mT
    across = z - axes
    inverse = (x / (1 + sizes).unsqueeze(-2)) @ x.mT
    return torch.cat([-across @ inverse, u - z, across, axes], dim=-1)


def leading_eigenvectors(side: Tensor) -> Tensor:
    """Return the eigenvectors (groups, n, k) in the basis of a long side.

    Example:
        >>> u = leading_eigenvectors(leading_basis(torch.randn(1, 400, 24)))
        >>> torch.allclose(u.mT @ u, torch.eye(8), atol=1e-5)
        True
    """
    _, turned_to, across, axes = side.chunk(4, dim=-1)
    return turned_to + across + axes


def split_leading(side: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values (groups, n) of a long side's coordinates: of its eigenvectors (groups, k), and of its entries.

    An entry whose place an eigenvector has taken gets the mean of the others (groups, n).
    """
    axes = side[..., -LEADING:]
    return (values.unsqueeze(-2) @ axes).squeeze(-2), _of_entries(axes.sum(-1), values)


def turn_squares(new: Tensor, old: Tensor, squares: Tensor) -> Tensor:
    """Return second moments (..., groups, r, n), taken for variances of uncorrelated coordinates, in a new basis.

    The shares of a new coordinate are the squared cosines between new and old directions. On a long side that holds
    for its leading ones; what is left of each row's sum goes to the others, in the proportions that they had.

    Example:
        >>> flip = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
        >>> turn_squares(flip, torch.eye(2)[None], torch.tensor([[[1.0, 2.0]]]))
        tensor([[[2., 1.]]])
    """
    if is_square(new):
        return squares @ (new.mT @ old).square().mT
    _, turned_to, across, axes = new.chunk(4, dim=-1)
    shares = turn(old, (turned_to + across + axes).mT).square()
    leading = squares @ shares.mT
    had, has = old[..., -LEADING:].sum(-1).unsqueeze(-2), axes.sum(-1).unsqueeze(-2)
    rest = _of_entries(had, squares) * (1 - has)
    left = (squares.sum(-1, keepdim=True) - leading.sum(-1, keepdim=True)).clamp_min(0.0)
    return rest * (left / rest.sum(-1, keepdim=True).clamp_min(TINY)) + leading @ axes.mT


def _of_entries(taken: Tensor, values: Tensor) -> Tensor:
    """Return values (..., n) of a long side, the mean of the others at entries whose places eigenvectors have taken."""
    mean = (values * (1 - taken)).sum(-1, keepdim=True) / (1 - taken).sum(-1, keepdim=True)
    return torch.where(taken > 0, mean, values)


def _scaled(rows: Tensor) -> Tensor:
    """Return rows (groups, r, n) over their largest element."""
    return rows / rows.abs().amax((-2, -1), keepdim=True).clamp_min(TINY)


def _evenly_ranked(rows: Tensor) -> Tensor:
    """Return at most so many rows (groups, r, n) at evenly spaced ranks of their norm, whatever their order."""
    count = rows.shape[-2]
    if count <= SKETCH_ROWS:
        return rows
    ranks = torch.arange(SKETCH_ROWS, device=rows.device) * (count - 1) // (SKETCH_ROWS - 1)
    # in float64, which one kind of device lacks, no square over- or underflows
    wide = torch.float32 if rows.device.type == "mps" else torch.float64
    chosen = torch.linalg.vector_norm(rows, dim=-1, dtype=wide).argsort(-1)[..., ranks]
    return rows.gather(-2, chosen.unsqueeze(-1).expand(*chosen.shape, rows.shape[-1]))
