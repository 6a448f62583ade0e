"""Preconditioners of a matrix's sides: one product in place of a turn into a basis, a division and a turn back.

Where the root of a second moment factors into ``r_i c_j``, Adam's step in the bases, ``P ((P^T G Q) / (r c^T)) Q^T``,
is ``(P r^-1 P^T) G (Q c^-1 Q^T)``. The matrices around G change only when the second moment is looked at.

That of a side with all eigenvectors is square (groups, n, n), that of one without a basis a diagonal (groups, n, 1).
With the leading eigenvectors U (n, k) of a long side, what lies in their span is divided by roots of theirs, the rest
by roots of the entries: ``U c_U^-1 U^T + (I - U U^T) D (I - U U^T) = D + W V^T`` with ``W = [U, D U]``. That is kept
as ``[D, W, V]`` (groups, n, 1 + 4k).
"""

import torch
from torch import Tensor

from gmn_optim.rule.sides import is_square, leading_eigenvectors, split_leading


def init_preconditioner(side: Tensor, groups: int, n: int) -> Tensor:
    """Return zeros for a side of n entries with this basis: before the first look there is no step.

    Example:
        >>> from gmn_optim.rule.sides import init_side
        >>> [tuple(init_preconditioner(init_side(1, n, torch.zeros(()))[0], 1, n).shape) for n in (3, 400)]
        [(1, 3, 3), (1, 400, 33)]
        >>> init_preconditioner(torch.empty(0), 1, 3).shape
        torch.Size([1, 3, 1])
    """
    width = 1 if not side.numel() else n if is_square(side) else 1 + side.shape[-1]
    return side.new_zeros(groups, n, width)


def make_preconditioner(side: Tensor, roots: Tensor, floor: Tensor) -> Tensor:
    """Return the preconditioner of a side.

    Args:
        side: Its basis, see :mod:`gmn_optim.rule.sides`; empty for a side without one.
        roots: What each coordinate in the basis is divided by (groups, n).
        floor: Added to them, () or (groups, 1).

    Example:
        >>> flip = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
        >>> make_preconditioner(flip, torch.tensor([[1.0, 2.0]]), torch.zeros(()))
        tensor([[[0.5000, 0.0000],
                 [0.0000, 1.0000]]])
    """
    if not side.numel():
        return (1 / (roots + floor)).unsqueeze(-1)
    if is_square(side):
        return (side / (roots + floor).unsqueeze(-2)) @ side.mT
    return _of_long_side(side, roots, floor)


def precondition(preconditioner: Tensor, values: Tensor) -> Tensor:
    """Return rows (groups, r, n) times a preconditioner, which is symmetric."""
    if preconditioner.shape[-1] == 1:
        return values * preconditioner.mT
    if is_square(preconditioner):
        return torch.bmm(values, preconditioner)
    diagonal, w, v = preconditioner.split(_widths(preconditioner), dim=-1)
    return torch.addcmul(torch.bmm(torch.bmm(values, w), v.mT), values, diagonal.mT)


def precondition_columns(preconditioner: Tensor, values: Tensor) -> Tensor:
    """Return a preconditioner times columns (groups, n, c)."""
    if preconditioner.shape[-1] == 1:
        return values * preconditioner
    if is_square(preconditioner):
        return torch.bmm(preconditioner, values)
    diagonal, w, v = preconditioner.split(_widths(preconditioner), dim=-1)
    return torch.addcmul(torch.bmm(v, torch.bmm(w.mT, values)), values, diagonal)


def _of_long_side(side: Tensor, roots: Tensor, floor: Tensor) -> Tensor:
    """Return the preconditioner of a side of which the leading eigenvectors are known."""
    of_leading, of_rest = split_leading(side, roots)
    u, diagonal = leading_eigenvectors(side), (1 / (of_rest + floor)).unsqueeze(-1)
    w = torch.cat([u, diagonal * u], dim=-1)
    inner = u.mT @ (diagonal * u) + torch.diag_embed(1 / (of_leading + floor))
    # W [[inner, -1], [-1, 0]], the sum of the terms with U on either side
    v = torch.cat([u @ inner - diagonal * u, -u], dim=-1)
    return torch.cat([diagonal, w, v], dim=-1)


def _widths(preconditioner: Tensor) -> tuple[int, int, int]:
    """Return the widths of the diagonal and of the two factors."""
    width = (preconditioner.shape[-1] - 1) // 2
    return 1, width, width
