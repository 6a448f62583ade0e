"""Features of a parameter that the learned term reads: all scale-free."""

from typing import NamedTuple

import torch
from torch import Tensor

from gmn_optim.constants import constant_tensor
from gmn_optim.rule.layout import Chunk

DECAYS = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
"""Decays of the moving averages of gradients and factors (Gelberg et al. 2025, section 7.2)."""

TIME_SCALES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5)
"""Time scales s of the step features tanh(t/s - 1)."""

TINY = 1e-18
"""Root mean squares below this count as zero; far below any useful gradient, above underflow of squares."""


class NormalizedFeatures(NamedTuple):
    """Per-parameter channels divided by their root mean square over the tensor, and that root mean square.

    Attributes:
        features: (size, c).
        scales: (segments, c).
    """

    features: Tensor
    scales: Tensor


def update_averages(averages: Tensor, values: Tensor) -> Tensor:
    """Return the moving averages (..., 6) one step on, given values (...)."""
    shares = constant_tensor(tuple(1.0 - decay for decay in DECAYS), averages.dtype, averages.device)
    return torch.lerp(averages, values.unsqueeze(-1), shares)


def parameter_features(chunk: Chunk, channels: tuple[Tensor, ...]) -> NormalizedFeatures:
    """Return the channels, each (size) or (size, c), divided by their root mean square over each tensor."""
    stacked = torch.cat([c if c.dim() == 2 else c.unsqueeze(-1) for c in channels], dim=-1)
    scales = chunk.mean_per_segment(stacked * stacked).sqrt()
    inverse = 1.0 / scales.clamp_min(TINY)
    return NormalizedFeatures(stacked * chunk.per_element(inverse), scales)


def time_features(step: Tensor) -> Tensor:
    """Return tanh(t/s - 1) for the eleven scales s (11).

    Example:
        >>> time_features(torch.tensor(1.0))[0].item()
        0.0
    """
    return torch.tanh(step / constant_tensor(TIME_SCALES, step.dtype, step.device) - 1.0)
