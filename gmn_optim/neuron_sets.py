"""Features of all neurons of a network over a set of data points, from the decomposed gradients of its layers."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from gmn_optim.constants import constant
from gmn_optim.gradients import DecomposedGradient
from gmn_optim.neurons import NeuronSpace, NeuronSpaces


class NeuronSets(NamedTuple):
    """Features of all neurons over a set of data points.

    Attributes:
        factors: ``(a, g)`` of every neuron for a choice of rows (r, n, 2); what a space lacks is zero.
        moments: Means over ALL rows of ``a``, ``a^2``, ``g`` and ``g^2`` (n, 4).
    """

    factors: Tensor
    moments: Tensor


def gather_neurons(gradients: Mapping[str, DecomposedGradient], spaces: NeuronSpaces, rows: int) -> NeuronSets:
    """Return the features of all neurons, with ``rows`` rows chosen so that the order of the data points is immaterial.

    Rows of one layer (data points times positions) are sorted by the norm of their backprops over the layers that
    share them, and ``rows`` evenly spaced ranks are kept: a stratified sample, the same for any order of the batch,
    in which slot k means the k-th quantile. A set smaller than ``rows`` repeats some of its members. A space in a
    stream borrows the factor that it lacks: the mean over the ports of the stream that have it.

    Args:
        gradients: Layer name to factors (b, p, i), (b, p, o); every layer of ``spaces`` must be there.
        spaces: The network's neuron spaces.
        rows: Number of rows r.
    """
    tables = {ports.name for ports in spaces.layers if ports.structure == "table"}
    flat = {ports.name: _flatten_rows(gradients[ports.name], ports.name in tables) for ports in spaces.layers}
    chosen = choose_rows(flat, rows)
    own = [_own_factors(space, flat, chosen) for space in spaces.spaces]
    if spaces.streams:
        own = _with_loans(own, spaces)
    filled = [_zero_filled(*pair) for pair in own]
    factors = torch.cat([torch.stack([a.rows, g.rows], dim=-1) for a, g in filled], dim=-2)
    moments = torch.cat([torch.stack([*a.moments, *g.moments], dim=-1) for a, g in filled], dim=-2)
    return NeuronSets(factors, moments)


class _Factor(NamedTuple):
    """One factor of the neurons of a space: chosen rows (r, n), and means of it and its square over all rows (n)."""

    rows: Tensor
    moments: tuple[Tensor, Tensor]

    def map(self, function: Callable[[Tensor], Tensor]) -> "_Factor":
        """Apply a function of tensors (..., n) to all parts."""
        return _Factor(function(self.rows), (function(self.moments[0]), function(self.moments[1])))

    def plus(self, other: "_Factor") -> "_Factor":
        """Return the sum, part by part."""
        mean, square = (one + another for one, another in zip(self.moments, other.moments, strict=True))
        return _Factor(self.rows + other.rows, (mean, square))


_Pair = tuple[_Factor | None, _Factor | None]


def _flatten_rows(gradient: DecomposedGradient, is_table: bool) -> tuple[Tensor, Tensor]:
    """Return the factors with data points and positions as one axis of rows; an empty batch counts as a row of zeros.

    The one neuron that stands for the rows of a table has activation 1: each position reads one row.
    """
    a, g = gradient.activations.flatten(0, 1), gradient.backprops.flatten(0, 1)
    if is_table:
        a = torch.ones_like(g[:, :1])
    return (a, g) if len(a) else (a.new_zeros(1, a.shape[1]), g.new_zeros(1, g.shape[1]))


def choose_rows(flat: Mapping[str, tuple[Tensor, Tensor]], rows: int) -> dict[str, Tensor]:
    """Return, for every layer, the numbers (rows) of rows at evenly spaced ranks of the norm of their backprops.

    Layers with equal numbers of rows share them: the norm is taken over all of those.

    Args:
        flat: Layer name to activations (R, i) and backprops (R, o).
        rows: How many; fewer rows than that are repeated.

    Example:
        >>> choose_rows({"0": (torch.ones(3, 1), torch.tensor([[3.0], [1.0], [2.0]]))}, 3)["0"].tolist()
        [1, 2, 0]
    """
    norms: dict[int, Tensor] = {}
    for a, g in flat.values():
        norm = torch.stack([a.square().sum(-1), g.square().sum(-1)])
        norms[g.shape[0]] = norms[g.shape[0]] + norm if g.shape[0] in norms else norm
    chosen = {count: _quantile_ranks(*norm, rows) for count, norm in norms.items()}
    return {name: chosen[g.shape[0]] for name, (_, g) in flat.items()}


def _quantile_ranks(of_a: Tensor, of_g: Tensor, rows: int) -> Tensor:
    """Return the row numbers at ``rows`` evenly spaced ranks of ``of_g``; rows of equal ``of_g`` stand by ``of_a``."""
    count = of_g.shape[0]
    ranks = torch.arange(rows, device=of_g.device).mul(2).add(1).mul(count).div(2 * rows, rounding_mode="floor")
    order = of_a.argsort(stable=True)
    return order[of_g[order].argsort(stable=True)][ranks]


def _own_factors(space: NeuronSpace, flat: Mapping[str, tuple[Tensor, Tensor]], chosen: Mapping[str, Tensor]) -> _Pair:
    """Return the factors that a space's own layers have."""
    a = _factor(flat[space.reader][0], chosen[space.reader]) if space.reader is not None else None
    g = _factor(flat[space.writer][1], chosen[space.writer]) if space.writer is not None else None
    return a, g


def _factor(values: Tensor, chosen: Tensor) -> _Factor:
    """Return the chosen rows of values (R, n), and the moments over all."""
    return _Factor(values[chosen], (values.mean(0), values.square().mean(0)))


def _zero_filled(a: _Factor | None, g: _Factor | None) -> tuple[_Factor, _Factor]:
    """Return both factors, a missing one as zeros."""
    zeros = (a or g).map(torch.zeros_like)
    return a or zeros, g or zeros


# ---------------------------------------------------------------------- loans within a stream


class _Borrower(NamedTuple):
    """A space in a stream, its factors, and the number of each neuron among the stream's members, None if in order."""

    space: NeuronSpace
    factors: _Pair
    members: Tensor | None


def _with_loans(own: list[_Pair], spaces: NeuronSpaces) -> list[_Pair]:
    """Return the factors with those of each stream lent to the ports that lack them."""
    device = next(factor for pair in own for factor in pair if factor is not None).rows.device
    indices = _member_numbers(spaces, device)
    ports = [_Borrower(*each) for each in zip(spaces.spaces, own, indices, strict=True)]
    lent = {
        (stream, half): _pooled([port for port in ports if port.space.stream == stream], half, size)
        for stream, size in enumerate(spaces.streams)
        for half in (0, 1)
    }
    return [port.factors if port.space.stream is None else _borrow(port, lent) for port in ports]


def _pooled(ports: list[_Borrower], half: int, members: int) -> _Factor:
    """Return the mean, over the ports that have it, of one factor of the stream's members."""
    total: _Factor | None = None
    counts: Tensor | int = 0
    for port in ports:
        factor = port.factors[half]
        if factor is not None:
            spread = factor.map(partial(_add_up, index=port.members, members=members))
            total = spread if total is None else total.plus(spread)
            counts = counts + _add_up(torch.ones_like(factor.moments[0]), port.members, members)
    return total.map(lambda part: part / counts.clamp_min(1))


def _add_up(part: Tensor, index: Tensor | None, members: int) -> Tensor:
    """Return the sums (..., members) of values (..., n) of neurons that are the same member."""
    if index is None:
        return part
    return part.new_zeros(*part.shape[:-1], members).index_add(-1, index, part)


def _borrow(port: _Borrower, lent: Mapping[tuple[int, int], _Factor]) -> _Pair:
    """Return a space's factors, a missing one from its stream."""
    a, g = (
        own if own is not None else lent[port.space.stream, half].map(partial(_of_members, index=port.members))
        for half, own in enumerate(port.factors)
    )
    return a, g


def _of_members(part: Tensor, index: Tensor | None) -> Tensor:
    """Return the values (..., n) of some members of a stream (..., members)."""
    return part if index is None else part[..., index]


@constant()
def _member_numbers(spaces: NeuronSpaces, device: torch.device) -> tuple[Tensor | None, ...]:
    """Return the number of each neuron among its stream's members, space by space; None for all in order."""
    return tuple(None if s.members is None else torch.tensor(s.members, device=device) for s in spaces.spaces)
