"""Arms from other packages: SOAP, Shampoo, schedule-free AdamW. Imported only when they train."""

import torch
from torch import nn

from gmn_optim.comparison.arms import OptimizerSet, geometric_grid, register
from gmn_optim.comparison.torch_arms import ADAM_LRS, WEIGHT_DECAY, with_cosine

PYTORCH_OPTIMIZER = ("pytorch_optimizer", "pytorch_optimizer>=4.1")
SCHEDULEFREE = ("schedulefree", "schedulefree>=1.4.1")


@register("soap", lrs=ADAM_LRS, needs=PYTORCH_OPTIMIZER)
def make_soap(model: nn.Module, lr: float, total_steps: int) -> torch.optim.Optimizer:
    """Return SOAP, its bases made anew every 10 steps (Vyas et al. 2024, arXiv 2409.11321)."""
    from pytorch_optimizer import SOAP

    return SOAP(model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY, precondition_frequency=10)


@register("soap-cosine", lrs=ADAM_LRS, needs=PYTORCH_OPTIMIZER)
def make_soap_cosine(model: nn.Module, lr: float, total_steps: int) -> OptimizerSet:
    """Return SOAP as above, its step size falling to 0 along a cosine."""
    return with_cosine(OptimizerSet([make_soap(model, lr, total_steps)]), total_steps)


@register("shampoo", lrs=geometric_grid(3.2e-3, 1.0), needs=PYTORCH_OPTIMIZER)
def make_shampoo(model: nn.Module, lr: float, total_steps: int) -> torch.optim.Optimizer:
    """Return Shampoo with steps of SGD's size, new roots every 10 steps (Anil et al. 2020, arXiv 2002.09018).

    The package's class of the name ``Shampoo`` has no grafting, and diverges on roots that are this old.
    """
    from pytorch_optimizer import ScalableShampoo

    return ScalableShampoo(model.parameters(), lr=lr, preconditioning_compute_steps=10)


@register("shampoo-rmsprop", lrs=ADAM_LRS, needs=PYTORCH_OPTIMIZER)
def make_shampoo_rmsprop(model: nn.Module, lr: float, total_steps: int) -> torch.optim.Optimizer:
    """Return Shampoo as above with steps of RMSProp's size."""
    from pytorch_optimizer import ScalableShampoo
    from pytorch_optimizer.optimizer.shampoo import LayerWiseGrafting

    return ScalableShampoo(
        model.parameters(), lr=lr, preconditioning_compute_steps=10, graft_type=LayerWiseGrafting.RMSPROP
    )


@register("schedule-free", lrs=geometric_grid(3.2e-4, 0.1), needs=SCHEDULEFREE)
def make_schedule_free(model: nn.Module, lr: float, total_steps: int) -> torch.optim.Optimizer:
    """Return schedule-free AdamW, 5 % of the steps as warm-up (Defazio et al. 2024, arXiv 2405.15682)."""
    from schedulefree import AdamWScheduleFree

    return AdamWScheduleFree(
        model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY, warmup_steps=max(1, total_steps // 20)
    )
