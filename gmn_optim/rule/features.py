"""Features of a parameter that the learned term reads: all scale-free."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gmn_optim.constants import constant_tensor
from gmn_optim.rule.layout import Chunk, Tile

DECAYS = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
"""Decays of the moving averages of gradients and factors (Gelberg et al. 2025, section 7.2)."""

TIME_SCALES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5)
"""Time scales s of the step features tanh(t/s - 1)."""

TINY = 1e-18
"""Root mean squares below this count as zero; far below any useful gradient, above underflow of squares."""


def inner_products(ones: Sequence[Sequence[Tensor]], others: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the inner products of vectors (n), each in flat parts.

    Example:
        >>> one, other = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
        >>> inner_products([[one, other], [one]], [[one, one], [other]])
        tensor([16., 11.])
    """
    parts = [(one, other) for pair in zip(ones, others, strict=True) for one, other in zip(*pair, strict=True)]
    return _sums(torch.stack([torch.dot(one, other) for one, other in parts]), [len(each) for each in ones])


def lengths(vectors: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the lengths of vectors (n), each in parts.

    Example:
        >>> lengths([[torch.tensor([1.0, 2.0]), torch.tensor([2.0])], [torch.tensor([4.0])]])
        tensor([3., 4.])
    """
    counts = [len(each) for each in vectors]
    found = torch.stack([torch.linalg.vector_norm(part) for each in vectors for part in each])
    return found if max(counts) == 1 else root(_sums(found.square(), counts))


def _sums(values: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the sums (n) of so many consecutive values each."""
    if min(counts) == max(counts):
        return values if counts[0] == 1 else values.view(-1, counts[0]).sum(-1)
    return torch.stack([each.sum() for each in values.split([*counts])])


def root(squares: Tensor) -> Tensor:
    """Return the square root, with slope zero at zero.

    There the slope of ``sqrt`` is infinite, and a product with zero on the way back is not a number: a space that lacks
    a factor, or a neuron without gradient, would end meta-training by backpropagation.

    Example:
        >>> x = torch.tensor([0.0, 4.0], requires_grad=True)
        >>> root(x).sum().backward()
        >>> x.grad.tolist()
        [0.0, 0.25]
    """
    return squares.clamp_min(TINY * TINY).sqrt() * (squares > 0)


def update_averages(averages: Tensor, values: Tensor) -> Tensor:
    """Return the moving averages (..., 6) one step on, given values (...)."""
    shares = constant_tensor(tuple(1.0 - decay for decay in DECAYS), averages.dtype, averages.device)
    return torch.lerp(averages, values.unsqueeze(-1), shares)


def join_channels(chunk: Chunk, channels: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the channels as one (size, c) where the chunk is worked on at once: put together once, read twice."""
    tiles = chunk.tiles()
    return (_stack(channels, tiles[0]),) if len(tiles) == 1 else channels


def channel_scales(chunk: Chunk, channels: tuple[Tensor, ...]) -> Tensor:
    """Return the root mean square over each tensor (segments, c) of the channels, each (size) or (size, c)."""
    tiles = chunk.tiles()
    if len(tiles) == 1:
        stacked = _stack(channels, tiles[0])
        return root(chunk.mean_per_segment(stacked * stacked))
    stacks = (_stack(channels, tile) for tile in tiles)
    # not square_(): vmap has no rule for it, and would take one training after the other
    squares = [stack.mul_(stack).sum(0, keepdim=True) for stack in stacks]
    return root(torch.stack(squares).sum(0) / chunk.size)


def parameter_features(chunk: Chunk, channels: tuple[Tensor, ...], scales: Tensor, tile: Tile) -> Tensor:
    """Return the channels of a tile, each divided by its root mean square over each tensor (tile size, c)."""
    inverse = 1.0 / scales.clamp_min(TINY)
    return _stack(channels, tile) * chunk.per_element(inverse)


def _stack(channels: tuple[Tensor, ...], tile: Tile) -> Tensor:
    """Return a tile's channels behind one another (tile size, c)."""
    if tile.rows is None:
        joined = [c if c.dim() == 2 else c.unsqueeze(-1) for c in channels]
        return joined[0] if len(joined) == 1 else torch.cat(joined, dim=-1)
    return torch.cat([c[tile.place] if c.dim() == 2 else c[tile.place].unsqueeze(-1) for c in channels], dim=-1)


def time_features(step: Tensor) -> Tensor:
    """Return tanh(t/s - 1) for the eleven scales s (11).

    Example:
        >>> time_features(torch.tensor(1.0))[0].item()
        0.0
    """
    return torch.tanh(step / constant_tensor(TIME_SCALES, step.dtype, step.device) - 1.0)
