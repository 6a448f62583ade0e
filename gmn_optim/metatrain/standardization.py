"""The persistent-evolution-strategies estimate of one slot, its loss differences standardised or not."""

import torch
from torch import Tensor

from gmn_optim.metatrain.estimators import bounded, weighted_mean
from gmn_optim.tasks.base import AbstractTask


def log_meta_loss(losses: Tensor, task: AbstractTask, age: int, end: int, emphasis: float = 0.0) -> Tensor:
    """Return the mean over a truncation of log(min(loss, limit) + floor), for each training (k).

    Args:
        losses: Of the steps of this truncation (steps, k); those that are not finite count as the limit.
        task: Has ``loss_limit`` and ``loss_floor``.
        age: Steps that the trainings had taken before it.
        end: Their horizon.
        emphasis: A loss at step t of T weighs (emphasis + 1) (t/T)^emphasis.

    Example:
        >>> from gmn_optim.tasks.quadratic import QuadraticTask
        >>> task = QuadraticTask()
        >>> task.loss_floor = 1.0
        >>> log_meta_loss(torch.zeros(5, 2), task, age=0, end=5)
        tensor([0., 0.])
    """
    logs = torch.log(bounded(losses, task.loss_limit).clamp_min(0.0) + task.loss_floor)
    return weighted_mean(logs, torch.tensor([age]), torch.tensor([end]), emphasis)


def standardize(differences: Tensor, floor: float = 0.0) -> Tensor:
    """Return differences (pairs) over their root mean square, or over ``floor`` if that is larger.

    Where all are zero they stay so. Pairs of a training that has failed differ by rounding errors alone; a floor keeps
    these from counting as much as all others.

    Example:
        >>> standardize(torch.tensor([3.0, -3.0])), standardize(torch.zeros(2))
        (tensor([ 1., -1.]), tensor([0., 0.]))
        >>> standardize(torch.tensor([0.5, -0.5]), floor=1.0)
        tensor([ 0.5000, -0.5000])
    """
    largest = differences.abs().max()
    if largest == 0:
        return differences
    # by the largest first: squares of tiny differences would vanish
    scaled = differences / largest
    return scaled / torch.maximum(scaled.square().mean().sqrt(), floor / largest)


def slot_gradient(
    positive: Tensor,
    negative: Tensor,
    perturbations: Tensor,
    *,
    truncations: int,
    sigma: float,
    standardized: bool,
    floor: float = 0.0,
) -> Tensor:
    """Return a slot's estimate of the meta-gradient (m).

    With d = L+ - L- and xi the sum of a pair's perturbations over its n truncations so far, it is

    * plain: ``mean over pairs of d xi / (2 sigma^2)``, which is unbiased for the meta-loss of this truncation;
    * standardised: ``mean over pairs of (d / RMS(d)) xi / (sigma sqrt(n))``, whose elements are of order 1 whatever
      the loss: the plain estimate times ``2 sigma / (sqrt(n) RMS(d))``. The sum over truncations and tasks then is a
      sum of unbiased estimates with positive weights, large where losses differ little. (The weight comes from the
      same pairs, so that it is not independent of the estimate it multiplies.)

    Args:
        positive: Meta-losses of the positive sides (pairs).
        negative: Of the negative sides (pairs).
        perturbations: xi (pairs, m).
        truncations: n.
        sigma: Standard deviation of one perturbation.
        standardized: Which of the two.
        floor: Of RMS(d) where they are standardised.

    Reference:
        Vicol, Metz and Sohl-Dickstein (2021), "Unbiased gradient estimation in unrolled computation graphs with
        persistent evolution strategies", arXiv 2112.13835, for the plain estimate.

    Example:
        >>> losses = torch.tensor([2.0]), torch.tensor([1.0])
        >>> slot_gradient(*losses, torch.tensor([[0.1, 0.0]]), truncations=1, sigma=0.1, standardized=True)
        tensor([1., 0.])
    """
    differences = positive - negative
    if standardized:
        return (standardize(differences, floor)[:, None] * perturbations).mean(0) / (sigma * truncations**0.5)
    return (differences[:, None] * perturbations).mean(0) / (2 * sigma**2)
