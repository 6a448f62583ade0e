"""Whether a classifier sees the same rows again, and so how large its data set is."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gmn_optim.constants import constant, constant_tensor

KEPT_ROWS, FEWEST_ROWS = 64, 1 / 4
"""So many rows of the first look are remembered, each as one number; fewer than this share of them tell nothing."""

COARSEST = 1e-6
"""Relative precision that a number needs so that different rows are not taken for the same."""

FOLD = 2.0**20
"""Sums over a row are folded at the inverse of this: what is the same in all rows may be large."""

SOFTMAX_TOLERANCE = 0.01
"""Rounding errors of backprops of a softmax, as a share of them."""


def fingerprints(activations: Tensor) -> Tensor:
    """Return a number from 0 to 1 for each row (r) float64 that the same row always has, and another one hardly ever.

    Rows of zeros, and rows that are not finite, have 0.

    Args:
        activations: Of rows (groups, r, i).

    Example:
        >>> found = fingerprints(torch.tensor([[[1.0, 2.0], [2.0, 1.0], [1.0, 2.0]]]))
        >>> (found == found[0]).tolist()
        [True, False, True]
    """
    groups, _, inputs = activations.shape
    rows = activations.detach().double() * _projection(groups, inputs, activations.device)
    # no product of matrices, and each row in one piece: rounding must not depend on where a row stands
    sums = rows.movedim(0, 1).flatten(1).contiguous().sum(-1) * FOLD
    return torch.where(sums.isfinite(), sums - sums.floor(), 0.0)


def follow_rows(old: Tensor, seen: Sequence[Tensor], on_host: bool = False) -> tuple[Tensor, Tensor]:
    """Return the rows to remember of each matrix (n, 64), and how often one stands in this look in the mean (n).

    What is remembered are the rows of the first look that stand in it once: the others, such as blank patches and
    rows of few symbols, are the same although data points differ. 0 stands for none.

    Args:
        old: Of each matrix, what is remembered from before (n, 64).
        seen: Of each, the fingerprints of this look (r).
        on_host: Whether it may be asked what is known, which costs nothing on a CPU.

    Example:
        >>> first, again = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.2, 0.5, 0.6, 0.7])
        >>> kept, times = follow_rows(torch.zeros(1, 64), [first])
        >>> kept[0].count_nonzero().item(), times.item()  # the first look has nothing to compare with
        (4, 0.0)
        >>> follow_rows(kept, [again])[1].item()
        0.25
    """
    now = _padded(seen).to(old.dtype)
    if torch.finfo(old.dtype).eps > COARSEST:
        return torch.zeros_like(old), old.new_zeros(len(old))
    known = old != 0
    number = known.sum(-1)
    times = ((old.unsqueeze(-1) == now.unsqueeze(-2)) & known.unsqueeze(-1)).sum((-2, -1)) / number.clamp_min(1)
    fewest = constant_tensor(tuple(FEWEST_ROWS * min(len(each), KEPT_ROWS) for each in seen), old.dtype, old.device)
    times = torch.where(number >= fewest, times.to(old.dtype), 0.0)
    if on_host and old.device.type == "cpu" and number.all():
        return old, times
    return torch.where(known.any(-1, keepdim=True), old, _standing_once(now)), times


def softmax_of_labels(backprops: Tensor) -> Tensor:
    """Return whether these are backprops of the cross-entropy of a softmax with labels ().

    Such backprops are probabilities but for that of the label, which lacks 1: those of a row sum to zero, and half of
    their absolute sum is the label's.

    Args:
        backprops: Of rows (groups, r, o).

    Example:
        >>> logits = torch.randn(5, 3, requires_grad=True)
        >>> torch.nn.functional.cross_entropy(logits, torch.tensor([0, 2, 1, 1, 0])).backward()
        >>> softmax_of_labels(logits.grad.unsqueeze(0)).item(), softmax_of_labels(torch.randn(1, 5, 3)).item()
        (True, False)
    """
    absolute = backprops.abs()
    total = absolute.sum()
    beyond = (total - 2 * absolute.amax(-1).sum()).abs() + backprops.sum(-1).abs().sum()
    return (beyond <= SOFTMAX_TOLERANCE * total) & (total > 0)


def _standing_once(now: Tensor) -> Tensor:
    """Return those of the first 64 numbers in order (n, 64) that stand once among all (n, r), 0 for the others."""
    # sorted, since no order of data points may change what is done; 0 comes last
    first = now.sort(dim=-1, descending=True).values[..., :KEPT_ROWS]
    alone = (first.unsqueeze(-1) == now.unsqueeze(-2)).sum(-1) == 1
    return torch.where(alone, first, 0.0)


def _padded(seen: Sequence[Tensor]) -> Tensor:
    """Return numbers of rows as one (n, r), 0 where there is no row, 64 rows at least."""
    longest = max(KEPT_ROWS, *(len(each) for each in seen))
    return torch.stack([torch.nn.functional.pad(each, (0, longest - len(each))) for each in seen])


@constant()
def _projection(groups: int, inputs: int, device: torch.device) -> Tensor:
    """Return weights of no pattern (groups, 1, i)."""
    places = torch.arange(1, groups * inputs + 1, dtype=torch.float64)
    return torch.cos(places.square()).to(device).view(groups, 1, inputs)
