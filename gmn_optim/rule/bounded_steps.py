"""A bound of the steps that preconditioners make: between two looks gradients may outgrow what they are divided by."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gmn_optim.constants import constant_tensor
from gmn_optim.rule.coordinates import Coordinates

LARGEST_SIZE = 1.5
"""A step of preconditioners has at most this root mean square. Adam's own have one at most."""


def bounded(matrices: Sequence[Coordinates]) -> list[Coordinates]:
    """Return matrices with bounds and sizes of steps, where preconditioners made these; others as they are."""
    made = [number for number, each in enumerate(matrices) if not each.is_turned]
    found = [*matrices]
    if made:
        steps = [matrices[number].step for number in made]
        sizes = root_mean_squares(steps, all(each.age is not None for each in matrices))
        bounds = LARGEST_SIZE / sizes.clamp_min(LARGEST_SIZE)
        sizes = sizes * bounds
        for number, bound, size in zip(made, bounds.unbind(), sizes.unbind(), strict=True):
            found[number] = found[number]._replace(step_size=size, bound=bound)
    return found


def root_mean_squares(steps: Sequence[Tensor], on_host: bool = False) -> Tensor:
    """Return the size of each step (n); where squares overflow, which they do long before steps, the largest element.

    Args:
        steps: The steps.
        on_host: Whether it may be asked if there is such a step, which costs nothing on a CPU.

    Example:
        >>> [f"{size:.4g}" for size in root_mean_squares([torch.tensor([3.0, -3.0]), torch.full((4,), -1e30)])]
        ['3', '1e+30']
    """
    shares = tuple(1 / math.sqrt(step.numel()) for step in steps)
    sizes = torch.stack([torch.linalg.vector_norm(step) for step in steps])
    sizes = sizes * constant_tensor(shares, sizes.dtype, sizes.device)
    if on_host and sizes.device.type == "cpu" and sizes.isfinite().all():
        return sizes
    return torch.where(sizes.isfinite(), sizes, torch.stack([step.abs().amax() for step in steps]))
