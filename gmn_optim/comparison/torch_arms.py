"""Arms from torch itself: Adam, AdamW with a cosine schedule, SGD with momentum, Muon."""

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from gmn_optim.comparison.arms import OptimizerSet, geometric_grid, register

ADAM_LRS = geometric_grid(1e-4, 3.2e-2)
"""Half decades from 0.0001 to 0.032."""

WEIGHT_DECAY = 0.01
"""Decoupled weight decay of AdamW and of all that is built on it here."""


@register("adam", lrs=ADAM_LRS)
def make_adam(model: nn.Module, lr: float, total_steps: int) -> torch.optim.Optimizer:
    """Return Adam with a constant step size (Kingma and Ba 2015, arXiv 1412.6980)."""
    return torch.optim.Adam(model.parameters(), lr=lr)


@register("adamw-cosine", lrs=ADAM_LRS)
def make_adamw_cosine(model: nn.Module, lr: float, total_steps: int) -> OptimizerSet:
    """Return AdamW whose step size falls to 0 along a cosine (Loshchilov and Hutter 2019, arXiv 1711.05101)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)
    return with_cosine(OptimizerSet([optimizer]), total_steps)


@register("sgd-momentum", lrs=geometric_grid(1e-3, 1.0))
def make_sgd_momentum(model: nn.Module, lr: float, total_steps: int) -> torch.optim.Optimizer:
    """Return SGD with momentum 0.9 (Polyak 1964)."""
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


@register("muon", lrs=ADAM_LRS, needs=("torch.optim._muon", "torch>=2.9"))
def make_muon(model: nn.Module, lr: float, total_steps: int) -> OptimizerSet:
    """Return Muon for hidden matrices and AdamW for all else, as its documentation asks (Jordan et al. 2024).

    Its step is scaled to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982), so that one lr serves both.
    """
    hidden, rest = split_hidden_matrices(model)
    made: list[torch.optim.Optimizer] = []
    if hidden:
        made.append(torch.optim.Muon(hidden, lr=lr, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"))
    if rest:
        made.append(torch.optim.AdamW(rest, lr=lr, weight_decay=WEIGHT_DECAY))
    return OptimizerSet(made)


@register("muon-cosine", lrs=ADAM_LRS, needs=("torch.optim._muon", "torch>=2.9"))
def make_muon_cosine(model: nn.Module, lr: float, total_steps: int) -> OptimizerSet:
    """Return Muon as above, its step size falling to 0 along a cosine."""
    return with_cosine(make_muon(model, lr, total_steps), total_steps)


def split_hidden_matrices(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Return the hidden matrices of a model, and all other parameters.

    Hidden are matrices that no embedding owns, except that of the last linear layer in the order of definition: input
    tables and output heads are left to AdamW. Convolutions have four axes, which torch's Muon does not take.

    Example:
        >>> hidden, rest = split_hidden_matrices(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
        >>> [tuple(each.shape) for each in hidden], [tuple(each.shape) for each in rest]
        ([(3, 4)], [(3,), (2, 3), (2,)])
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)]
    outside = {id(weight) for weight in [*tables, *(module.weight for module in linear[-1:])]}
    hidden = [each for each in model.parameters() if each.dim() == 2 and id(each) not in outside]
    chosen = {id(each) for each in hidden}
    return hidden, [each for each in model.parameters() if id(each) not in chosen]


def with_cosine(made: OptimizerSet, total_steps: int) -> OptimizerSet:
    """Return the same optimizers, their step sizes falling to 0 along a cosine over ``total_steps``.

    Example:
        >>> made = with_cosine(OptimizerSet([torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)]), total_steps=2)
        >>> made.step(), made.step()
        (None, None)
        >>> made.optimizers[0].param_groups[0]["lr"]
        0.0
    """
    return OptimizerSet(made.optimizers, [CosineAnnealingLR(each, T_max=total_steps) for each in made.optimizers])
