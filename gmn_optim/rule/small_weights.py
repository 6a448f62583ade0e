"""Networks whose weights are small by design, such as SIREN: how they are told, and what steps suit them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gmn_optim.constants import constant
from gmn_optim.rule.matrices import Matrix

LEAST_SIZE = 0.02
"""A weight that is smaller than this at first, such as zero, tells nothing."""

SMALL = 0.18
"""Sizes below this are small. SIREN's hidden weights have 0.08; an initialization with standard deviation 0.02 is below
only in networks no wider than 27."""

STEP, SHARPNESS = 1 / 12, 4.0
"""What steps of such a network are multiplied by, less in layers of more than 64 inputs; its average remembers a
quarter of the training. Chosen, like having no basis, on fits of photographs that are in no test task."""


def relative_sizes(sizes: Tensor, inputs: Sequence[int]) -> Tensor:
    """Return root mean squares of weights (n) against those of torch's initialization, ``1 / sqrt(3 inputs)``.

    Example:
        >>> relative_sizes(torch.tensor([0.5]), [3])
        tensor([1.5000])
    """
    return sizes * _roots(tuple(inputs), sizes.dtype, sizes.device)


def first_sizes(matrices: Sequence[Matrix], sizes: Sequence[Tensor]) -> Tensor:
    """Return the relative sizes (n) of weights before the first step, 0 of tables, which tell nothing.

    Args:
        matrices: The matrices.
        sizes: Root mean square of each weight before its first step ().
    """
    inputs = [0 if matrix.weight.role == "table" else matrix.inputs for matrix in matrices]
    return relative_sizes(torch.stack([*sizes]), inputs)


def are_small(sizes: Tensor) -> Tensor:
    """Return whether most matrices of a network, but not all, began with small weights (), by their relative sizes (n).

    Where all are small, that is one scale that somebody chose; SIREN's first layer has weights of the usual size.

    Example:
        >>> are_small(torch.tensor([0.7, 0.08, 0.08])), are_small(torch.tensor([1.0, 0.1, 0.0]))
        (tensor(True), tensor(False))
    """
    telling = sizes >= LEAST_SIZE
    count, small = telling.sum(), (telling & (sizes < SMALL)).sum()
    return (2 * small > count) & (small < count)


@constant()
def _roots(inputs: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the root of three times the inputs of each matrix (n)."""
    return torch.tensor([math.sqrt(3 * n) for n in inputs], dtype=dtype, device=device)
