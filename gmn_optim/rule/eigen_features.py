"""What the eigenbasis body reads: features of coordinates and of layers, the same for either sign.

An eigenvector is only defined up to its sign. All features here stay as they are when one is turned around, so that a
step made of them times signed coordinates turns with it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gmn_optim.rule.coordinates import Coordinates
from gmn_optim.rule.features import root
from gmn_optim.rule.nominal import LEAST_SQUARE

COORDINATE_CHANNELS, LAYER_CHANNELS = 6, 6

LEAST_PART = 1e-8
"""Of the mean square: what is smaller counts as this."""

SCALES = 0.5, 0.25, 0.25, 0.25, 0.25
_LOWEST, _HIGHEST = -16.0, 16.0


def coordinate_features(each: Coordinates) -> Tensor:
    """Return features of every coordinate of a matrix (groups, o, i, 6).

    Half the log of signal against noise; logs of signal and noise against their means over the matrix; the log of the
    signal of its row and of its column against that mean; how large this step's gradient is among those before.
    """
    signal, noise = (_above_rounding(s) for s in (each.squares, each.squares if each.noise is None else each.noise))
    own = [_log(signal) - _log(noise), _relative_log(signal), _relative_log(noise)]
    mean = _log(signal.mean((-2, -1), keepdim=True))
    sides = [(_log(signal.mean(axis, keepdim=True)) - mean).expand_as(signal) for axis in (-1, -2)]
    scaled = [log.clamp(_LOWEST, _HIGHEST) * scale for log, scale in zip([*own, *sides], SCALES, strict=True)]
    now = each.gradient.square()
    return torch.stack([*scaled, now / (now + signal)], dim=-1)


def layer_features(each: Coordinates, parameters: Tensor, matrices: int) -> Tensor:
    """Return features of a whole matrix (groups, 6).

    Logs of its inputs, of its outputs and of the number of matrices; signal against noise; the cosine between gradient
    and average; the log of the root mean square of its parameters (groups, o, i) times the root of its inputs.
    """
    outputs, inputs = each.step.shape[-2:]
    ones = each.step.new_ones(each.step.shape[0])
    noise = each.squares if each.noise is None else each.noise
    ratio = _log(each.squares.mean((-2, -1))) - _log(noise.mean((-2, -1)))
    size = _log(parameters.square().mean((-2, -1))) + math.log(inputs)
    logs = [ones * math.log(n / reference) for n, reference in ((inputs, 64), (outputs, 32), (matrices, 2))]
    cosine = _cosine(each.own_gradient, each.average, each.matrix.groups)
    parts = [*logs, ratio.clamp(_LOWEST, _HIGHEST), 6 * cosine, size.clamp(_LOWEST, _HIGHEST)]
    return 0.5 * torch.stack(parts, dim=-1)


def _above_rounding(squares: Tensor) -> Tensor:
    """Return values (groups, o, i), those far below their mean, which are rounding errors, raised to one level."""
    return torch.maximum(squares, LEAST_PART * squares.mean((-2, -1), keepdim=True))


def _log(squares: Tensor) -> Tensor:
    """Return the logarithm, finite at zero."""
    return squares.clamp_min(LEAST_SQUARE).log()


def _relative_log(squares: Tensor) -> Tensor:
    """Return the logarithm of values (groups, o, i) over their mean."""
    return _log(squares) - _log(squares.mean((-2, -1), keepdim=True))


def _cosine(ones: Sequence[Tensor], others: Sequence[Tensor], groups: int) -> Tensor:
    """Return the cosine between the blocks of matrices in flat parts (groups), 0 where either is zero."""
    both = [torch.cat([part.view(groups, -1) for part in parts], dim=-1) for parts in (ones, others)]
    lengths = root(both[0].square().sum(-1)) * root(both[1].square().sum(-1))
    return (both[0] * both[1]).sum(-1) / lengths.clamp_min(LEAST_SQUARE)
