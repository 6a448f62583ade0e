"""Meta-learned scalars, kept in log space so that a small step of meta-training is a relative change."""

from typing import TypeVar

import torch
from torch import Tensor, nn

SPEED = 10.0
"""A perturbation of 0.01 of the stored number changes the scalar by 10 %, and meta-training moves it ten times
faster than a weight (the scaling of the hyper-parameters in Metz et al. 2022, arXiv 2203.11860)."""


class LogScalar(nn.Module):
    """A positive scalar ``initial * exp(10 r)`` with meta-parameter r, zero at first.

    Example:
        >>> LogScalar(0.1)().item() == torch.tensor(0.1).item()
        True
    """

    def __init__(self, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.raw = nn.Parameter(torch.zeros(()))

    def forward(self) -> Tensor:
        """Return the scalar ()."""
        return self.initial * torch.exp(SPEED * self.raw)


class Decay(nn.Module):
    """The factor of an exponential moving average, ``1 - (1 - initial) exp(10 r)``, never below zero.

    Example:
        >>> round(Decay(0.9)().item(), 6)
        0.9
    """

    def __init__(self, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.raw = nn.Parameter(torch.zeros(()))

    def forward(self) -> Tensor:
        """Return the factor ()."""
        if self.initial == 0.0:
            return torch.zeros_like(self.raw)
        return (1.0 - (1.0 - self.initial) * torch.exp(SPEED * self.raw)).clamp_min(0.0)


class FixedScalar(nn.Module):
    """A scalar that was worked out once.

    Args:
        value: The scalar ().
        initial: What it was before any meta-training.
    """

    def __init__(self, value: Tensor, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.register_buffer("value", value)

    def forward(self) -> Tensor:
        """Return the scalar ()."""
        return self.value


Rule = TypeVar("Rule", bound=nn.Module)


def fix_scalars(module: Rule) -> Rule:
    """Work out every scalar of a module for good, in place, and return the module.

    For a module whose meta-parameters change no more: a dozen small operations fewer in each step.

    Example:
        >>> sum(p.numel() for p in fix_scalars(nn.ModuleList([LogScalar(0.1), Decay(0.9)])).parameters())
        0
    """
    for parent in [*module.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, (LogScalar, Decay)):
                setattr(parent, name, FixedScalar(child().detach(), child.initial))
    return module
