"""From what is proven of each layer's neurons to the neuron spaces of a network.

Every side of a layer is a port. Ports with a neuron in common are in one stream; a stream of nothing but one writer and
the reader of the same neurons is one space, in any other each port is a space of its own.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

from gmn_optim.neurons import LayerPorts, LayerSpec, LayerWiring, NeuronSpace, NeuronSpaces


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
