"""How large an error may be."""

from collections.abc import Mapping

import torch
from torch import Tensor

TOLERANCES: Mapping[torch.dtype, float] = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest error, relative to the largest value, that counts as rounding."""


def tolerance_for(dtype: torch.dtype, given: float | None) -> float:
    """Return the tolerance that was given, else the one for the dtype."""
    return TOLERANCES.get(dtype, 1e-2) if given is None else given


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest error relative to the largest expected value; infinite where shapes differ or for NaN."""
    if found.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    error = (found - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return error.nan_to_num(nan=float("inf"), posinf=float("inf")).item()
