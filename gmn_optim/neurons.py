"""Neuron spaces: which neurons a network has, which layers share them, and their features over a set of data points.

A space is a set of neurons that one permutation acts on. A hidden space of an MLP is written by one layer, whose
backprops are its ``g``, and read by the next, whose input activations are its ``a``. Ports of layers that cannot be
proven to share neurons stay separate spaces, which is safe: equivariance then holds for a larger group.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from gmn_optim.gradients import DecomposedGradient


@dataclass(frozen=True)
class NeuronSpace:
    """Neurons that are permuted together.

    Attributes:
        width: Number of neurons.
        kind: ``input`` and ``output`` neurons of the network are fixed and may carry a code of their own;
            ``hidden`` ones may not.
        depth: Place in the chain of spaces, from 0.
        reader: Name of the layer whose input activations are this space's ``a``, or None.
        writer: Name of the layer whose backprops are this space's ``g``, or None.
    """

    width: int
    kind: Literal["input", "hidden", "output"]
    depth: int
    reader: str | None = None
    writer: str | None = None


@dataclass(frozen=True)
class LayerPorts:
    """The two spaces that a layer joins, as places in :attr:`NeuronSpaces.spaces`."""

    name: str
    input_space: int
    output_space: int


@dataclass(frozen=True)
class NeuronSpaces:
    """The spaces of a network and the layers between them. All neurons stand behind one another on one axis (n).

    Example:
        >>> spaces = chain_spaces([4, 3, 2])
        >>> spaces.size, [spaces.place(k) for k in range(3)]
        (9, [slice(0, 4, None), slice(4, 7, None), slice(7, 9, None)])
    """

    spaces: tuple[NeuronSpace, ...]
    layers: tuple[LayerPorts, ...]

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Return the width of every space."""
        return tuple(space.width for space in self.spaces)

    @cached_property
    def size(self) -> int:
        """Return the number of all neurons."""
        return sum(self.widths)

    def place(self, space: int) -> slice:
        """Return where the neurons of space number ``space`` stand on the neuron axis."""
        start = sum(self.widths[:space])
        return slice(start, start + self.widths[space])

    def layer(self, name: str) -> LayerPorts:
        """Return the ports of the layer called ``name``."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, LayerPorts]:
        """Index the layers by name."""
        return {ports.name: ports for ports in self.layers}


class Flow(Protocol):
    """What is known of where a layer's input comes from and where its output goes."""

    source: str | None
    reads_model_input: bool
    is_model_output: bool


def infer_spaces(widths: Mapping[str, tuple[int, int]], flows: Mapping[str, Flow]) -> NeuronSpaces:
    """Return the spaces of a network from what flowed between its layers.

    Args:
        widths: Layer name to its numbers of input and output neurons (i, o).
        flows: Layer name to what is known of it; a layer that is absent joins two spaces of its own.

    Example:
        >>> from types import SimpleNamespace as Flow
        >>> flows = {"a": Flow(source=None, reads_model_input=True, is_model_output=False),
        ...          "b": Flow(source="a", reads_model_input=False, is_model_output=True)}
        >>> [(s.width, s.kind) for s in infer_spaces({"a": (4, 3), "b": (3, 2)}, flows).spaces]
        [(4, 'input'), (3, 'hidden'), (2, 'output')]
    """
    spaces: list[NeuronSpace] = []
    written: dict[str, int] = {}
    layers = []
    for name in _sources_first(list(widths), flows):
        fan_in, fan_out = widths[name]
        flow = flows.get(name)
        source = written.get(flow.source) if flow is not None else None
        # a port may have other neurons than its source, such as the taps of a convolution
        if source is not None and spaces[source].width == fan_in:
            input_space = source
            shared = spaces[input_space]
            spaces[input_space] = NeuronSpace(shared.width, "hidden", shared.depth, name, shared.writer)
        else:
            input_space = len(spaces)
            proven = flow is not None and flow.reads_model_input
            spaces.append(NeuronSpace(fan_in, "input" if proven else "hidden", 0, reader=name))
        written[name] = len(spaces)
        kind = "output" if flow is not None and flow.is_model_output else "hidden"
        spaces.append(NeuronSpace(fan_out, kind, spaces[input_space].depth + 1, writer=name))
        layers.append(LayerPorts(name, input_space, written[name]))
    return NeuronSpaces(tuple(spaces), tuple(layers))


def chain_spaces(widths: list[int]) -> NeuronSpaces:
    """Return the spaces of a plain MLP with these widths d_0..d_L and layers called "0".."L-1"."""
    last = len(widths) - 1
    spaces = tuple(
        NeuronSpace(
            width,
            "input" if depth == 0 else "output" if depth == last else "hidden",
            depth,
            reader=str(depth) if depth < last else None,
            writer=str(depth - 1) if depth > 0 else None,
        )
        for depth, width in enumerate(widths)
    )
    return NeuronSpaces(spaces, tuple(LayerPorts(str(k), k, k + 1) for k in range(last)))


def _sources_first(names: list[str], flows: Mapping[str, Flow]) -> list[str]:
    """Order layers so that each comes after the one that feeds it, else as given."""
    ordered: list[str] = []
    waiting = dict.fromkeys(names)
    while waiting:
        ready = [n for n in waiting if n not in flows or flows[n].source is None or flows[n].source not in waiting]
        name = ready[0] if ready else next(iter(waiting))
        ordered.append(name)
        del waiting[name]
    return ordered


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
    in which slot k means the k-th quantile. A set smaller than ``rows`` repeats some of its members.

    Args:
        gradients: Layer name to factors (b, p, i), (b, p, o); every layer of ``spaces`` must be there.
        spaces: The network's neuron spaces.
        rows: Number of rows r.
    """
    flat = {ports.name: _flatten_rows(gradients[ports.name]) for ports in spaces.layers}
    chosen = _choose_rows(flat, rows)
    factors, moments = [], []
    for space in spaces.spaces:
        a = flat[space.reader][0] if space.reader else None
        g = flat[space.writer][1] if space.writer else None
        picked_a = a[chosen[space.reader]] if a is not None else None
        picked_g = g[chosen[space.writer]] if g is not None else None
        factors.append(torch.stack(_zero_filled(picked_a, picked_g), dim=-1))
        moments.append(torch.stack([*_moments(a, g), *_moments(g, a)], dim=-1))
    return NeuronSets(torch.cat(factors, dim=-2), torch.cat(moments, dim=-2))


def _flatten_rows(gradient: DecomposedGradient) -> tuple[Tensor, Tensor]:
    """Return the factors with data points and positions as one axis of rows; an empty batch counts as a row of zeros."""
    a, g = gradient.activations.flatten(0, 1), gradient.backprops.flatten(0, 1)
    return (a, g) if len(a) else (a.new_zeros(1, a.shape[1]), g.new_zeros(1, g.shape[1]))


def _choose_rows(flat: Mapping[str, tuple[Tensor, Tensor]], rows: int) -> dict[str, Tensor]:
    """Return, for every layer, the chosen row numbers; layers with equal numbers of rows share them."""
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


def _zero_filled(a: Tensor | None, g: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return both factors, a missing one as zeros."""
    present = a if a is not None else g
    zeros = torch.zeros_like(present)
    return (a if a is not None else zeros), (g if g is not None else zeros)


def _moments(values: Tensor | None, other: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the mean and the mean square over rows; zeros, sized like ``other``, where there are no values."""
    if values is None:
        zeros = torch.zeros_like(other[0])
        return zeros, zeros
    return values.mean(0), values.square().mean(0)
