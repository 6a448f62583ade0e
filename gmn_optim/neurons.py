"""Neuron spaces: which neurons a network has, which layers share them, and how streams of them are made.

A space is a set of neurons that one permutation acts on. A hidden space of an MLP is written by one layer, whose
backprops are its ``g``, and read by the next, whose input activations are its ``a``. Where many layers read and write
the same neurons (a residual stream, the channels before a flattening), each port is a space of its own, and the ports
of the stream lend one another the factor that they lack. Ports of layers that cannot be proven to share neurons stay
separate, which is safe: equivariance then holds for a larger group.
"""

from collections.abc import Hashable, Mapping, Sequence
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


def infer_spaces(specs: Mapping[str, LayerSpec], wiring: Mapping[str, LayerWiring]) -> NeuronSpaces:
    """Return the spaces of a network from what is proven of its layers' neurons.

    Args:
        specs: Layer name to the layer's form.
        wiring: Layer name to what is known of its neurons, in the order of the calls; a layer that is absent joins
            two spaces of its own.

    Example:
        >>> wiring = {"a": LayerWiring((0, 1), (2, 3, 4), True), "b": LayerWiring((2, 3, 4), (5, 6), False, True)}
        >>> [(s.width, s.kind) for s in infer_spaces({"a": LayerSpec(2, 3), "b": LayerSpec(3, 2)}, wiring).spaces]
        [(2, 'input'), (3, 'hidden'), (2, 'output')]
    """
    names = [*(name for name in wiring if name in specs), *(name for name in specs if name not in wiring)]
    ports = [port for name in names for port in _ports_of(name, specs[name], wiring.get(name, LayerWiring()))]
    streams = _join_ports(ports)
    depths = _depths(ports, streams)
    spaces: list[NeuronSpace] = []
    places: dict[tuple[str, bool], int] = {}
    sizes: list[int] = []
    for port in ports:
        stream = streams[port.key]
        if port.key in places:
            continue
        pair = None if port.is_scaled else _pair_of(stream)
        if pair is None and not port.is_scaled and stream.lends and stream.number is None:
            stream.number = len(sizes)
            sizes.append(len(stream.members))
        places.update(dict.fromkeys([each.key for each in pair or [port]], len(spaces)))
        spaces.append(_space_of(pair or [port], stream, depths[id(stream)]))
    layers = [_layer_ports(name, specs[name], places) for name in names]
    return NeuronSpaces(tuple(spaces), tuple(layers), tuple(sizes))


# ---------------------------------------------------------------------- ports and streams


class _Port(NamedTuple):
    """One side of a layer.

    Attributes:
        layer: Its name.
        is_writer: Whether it is the layer's output.
        width: Number of neurons.
        names: Name of each neuron.
        is_end: Whether these are neurons of the model's input or output.
        is_scaled: Whether the layer scales each neuron by itself: one port, which has both factors.
    """

    layer: str
    is_writer: bool
    width: int
    names: tuple[Hashable, ...]
    is_end: bool
    is_scaled: bool = False

    @property
    def key(self) -> tuple[str, bool]:
        """Identify the port."""
        return self.layer, self.is_writer


class _Stream:
    """Ports that share neurons."""

    def __init__(self) -> None:
        self.ports: list[_Port] = []
        self.members: dict[Hashable, int] = {}
        self.number: int | None = None

    def add(self, port: _Port) -> None:
        """Take in a port and its neurons."""
        self.ports.append(port)
        for name in port.names:
            self.members.setdefault(name, len(self.members))

    @property
    def lends(self) -> bool:
        """Whether there are both readers and writers."""
        plain = {port.is_writer for port in self.ports if not port.is_scaled}
        return len(plain) == 2


def _ports_of(name: str, spec: LayerSpec, known: LayerWiring) -> list[_Port]:
    """Return the ports of a layer; neurons of which nothing is known get names of their own."""
    inputs = known.inputs if known.inputs is not None and len(known.inputs) == spec.inputs else None
    outputs = known.outputs if known.outputs is not None and len(known.outputs) == spec.outputs else None
    inputs = inputs or tuple((name, "input", number) for number in range(spec.inputs))
    outputs = outputs or tuple((name, "output", number) for number in range(spec.outputs))
    if spec.structure == "diagonal":
        return [_Port(name, True, spec.outputs, outputs, known.is_model_output, is_scaled=True)]
    is_input = known.reads_model_input and spec.structure == "matrix"
    return [
        _Port(name, False, spec.inputs, inputs, is_input),
        _Port(name, True, spec.outputs, outputs, known.is_model_output),
    ]


def _join_ports(ports: Sequence[_Port]) -> dict[tuple[str, bool], _Stream]:
    """Return the stream of each port: ports with a neuron in common are in one."""
    by_name: dict[Hashable, list[int]] = {}
    parents = list(range(len(ports)))

    def root(number: int) -> int:
        while parents[number] != number:
            parents[number] = number = parents[parents[number]]
        return number

    for number, port in enumerate(ports):
        for name in set(port.names):
            first = by_name.setdefault(name, [number])[0]
            parents[root(number)] = root(first)
    streams: dict[int, _Stream] = {}
    for number, port in enumerate(ports):
        streams.setdefault(root(number), _Stream()).add(port)
    return {port.key: streams[root(number)] for number, port in enumerate(ports)}


def _pair_of(stream: _Stream) -> list[_Port] | None:
    """Return reader and writer of a stream with none but these two, neuron by neuron; else None."""
    plain = sorted((port for port in stream.ports if not port.is_scaled), key=lambda port: port.is_writer)
    if len(plain) != 2 or not stream.lends:
        return None
    reader, writer = plain
    is_one_to_one = reader.names == writer.names and len(stream.members) == reader.width
    return [reader, writer] if is_one_to_one and reader.layer != writer.layer else None


def _depths(ports: Sequence[_Port], streams: Mapping[tuple[str, bool], _Stream]) -> dict[int, int]:
    """Return for each stream how many layers lead to it, by the first way that was seen."""
    depths: dict[int, int] = {}
    latest: dict[str, int] = {}
    for port in ports:
        stream = id(streams[port.key])
        latest[port.layer] = depths.setdefault(stream, latest[port.layer] + 1 if port.layer in latest else 0)
    return depths


def _space_of(ports: list[_Port], stream: _Stream, depth: int) -> NeuronSpace:
    """Return the space of one port, or of the reader and the writer of the same neurons."""
    port, *others = ports
    if others:
        return NeuronSpace(port.width, "hidden", depth, port.layer, others[0].layer)
    kind = ("output" if port.is_writer else "input") if port.is_end else "hidden"
    if port.is_scaled:
        return NeuronSpace(port.width, kind, depth, port.layer, port.layer)
    members = tuple(stream.members[name] for name in port.names)
    in_order = members == tuple(range(len(stream.members)))
    reader, writer = (None, port.layer) if port.is_writer else (port.layer, None)
    lent = stream.number, None if in_order else members
    return NeuronSpace(port.width, kind, depth, reader, writer, *(lent if stream.lends else (None, None)))


def _layer_ports(name: str, spec: LayerSpec, places: Mapping[tuple[str, bool], int]) -> LayerPorts:
    """Return a layer's ports as places among the spaces."""
    output_space = places[name, True]
    return LayerPorts(
        name, places.get((name, False), output_space), output_space, spec.groups, spec.structure, spec.rows
    )
