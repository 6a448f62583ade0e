"""Neuron spaces: which neurons a network has, which layers share them, and how streams of them are made.

A space is a set of neurons that one permutation acts on. A hidden space of an MLP is written by one layer, whose
backprops are its ``g``, and read by the next, whose input activations are its ``a``. Where many layers read and write
the same neurons (a residual stream, the channels before a flattening), each port is a space of its own, and the ports
of the stream lend one another the factor that they lack. Ports of layers that cannot be proven to share neurons stay
separate, which is safe: equivariance then holds for a larger group.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

Structure = Literal["matrix", "diagonal", "table"]
"""How factors become the gradient of a weight: a sum of outer products ``g a^T``, the products ``g * a`` of each neuron
by itself, or ``g`` added to the rows of a table that the activations name."""


class LayerSpec(NamedTuple):
    """What the rule must know of a layer.

    Attributes:
        inputs: Input neurons i.
        outputs: Output neurons o.
        groups: Blocks of inputs and outputs; an output sees the inputs of its block.
        structure: How factors become the weight's gradient.
        rows: Rows of a table, else 0.
    """

    inputs: int
    outputs: int
    groups: int = 1
    structure: Structure = "matrix"
    rows: int = 0


class LayerWiring(NamedTuple):
    """What is proven of a layer's neurons. Equal names mean the same neuron, wherever they stand.

    Attributes:
        inputs: Name of each input neuron (i), or None if nothing is known.
        outputs: Name of each output neuron (o), or None.
        reads_model_input: Whether the layer's input is a tensor given to the model.
        is_model_output: Whether the model returns these output neurons.
    """

    inputs: tuple[Hashable, ...] | None = None
    outputs: tuple[Hashable, ...] | None = None
    reads_model_input: bool = False
    is_model_output: bool = False


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
        stream: Number of the stream that lends what reader or writer is missing for, or None.
        members: Which member of the stream each neuron is (width); None for all of them in order.
    """

    width: int
    kind: Literal["input", "hidden", "output"]
    depth: int
    reader: str | None = None
    writer: str | None = None
    stream: int | None = None
    members: tuple[int, ...] | None = None


@dataclass(frozen=True)
class LayerPorts:
    """The two spaces that a layer joins, as places in :attr:`NeuronSpaces.spaces`, and its :class:`LayerSpec`."""

    name: str
    input_space: int
    output_space: int
    groups: int = 1
    structure: Structure = "matrix"
    rows: int = 0


@dataclass(frozen=True)
class NeuronSpaces:
    """The spaces of a network and the layers between them. All neurons stand behind one another on one axis (n).

    Attributes:
        spaces: The spaces.
        layers: The layers between them.
        streams: Number of members of each stream.

    Example:
        >>> spaces = chain_spaces([4, 3, 2])
        >>> spaces.size, [spaces.place(k) for k in range(3)]
        (9, [slice(0, 4, None), slice(4, 7, None), slice(7, 9, None)])
    """

    spaces: tuple[NeuronSpace, ...]
    layers: tuple[LayerPorts, ...]
    streams: tuple[int, ...] = ()

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
        return self._places[space]

    def layer(self, name: str) -> LayerPorts:
        """Return the ports of the layer called ``name``."""
        return self._by_name[name]

    def __hash__(self) -> int:
        """Return the hash, worked out once: tables of constants are keyed by networks with many neurons."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.spaces, self.layers, self.streams))

    @cached_property
    def _places(self) -> tuple[slice, ...]:
        """Return the place of every space."""
        starts = [sum(self.widths[:number]) for number in range(len(self.widths))]
        return tuple(slice(start, start + width) for start, width in zip(starts, self.widths, strict=True))

    @cached_property
    def _by_name(self) -> dict[str, LayerPorts]:
        """Index the layers by name."""
        return {ports.name: ports for ports in self.layers}


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
