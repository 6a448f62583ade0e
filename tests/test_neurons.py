"""Neuron spaces are shared only where that is proven, and ports of a stream lend one another what they lack."""

from collections.abc import Hashable
from typing import NamedTuple

import pytest
import torch
from torch import nn

from gmn_optim.capture import GradientCapture
from gmn_optim.neurons import LayerPorts, LayerSpec, LayerWiring, NeuronSpace, NeuronSpaces, chain_spaces
from gmn_optim.streams import infer_spaces
from tests import reference
from tests.cases import random_wiring


def n(name: str, *numbers: int) -> tuple[str, ...]:
    """Return names of neurons: ``n("h", 3)`` are the first three called h, ``n("h", 2, 4)`` those from 2 to 4."""
    return tuple(f"{name}{number}" for number in range(*numbers))


class Case(NamedTuple):
    """Layers, what is known of them, and the spaces and ports that follow.

    Attributes:
        specs: The layers' forms.
        wiring: What is known.
        spaces: Width, kind, depth, reader, writer and, for ports of a stream, its number and the members.
        layers: Name, input and output space.
        streams: Number of members of each stream.
    """

    specs: dict[str, LayerSpec]
    wiring: dict[str, LayerWiring]
    spaces: list[tuple[object, ...]]
    layers: list[tuple[object, ...]]
    streams: tuple[int, ...] = ()


CASES = {
    "chain": Case(
        {"a": LayerSpec(4, 3), "b": LayerSpec(3, 5), "c": LayerSpec(5, 2)},
        {
            "a": LayerWiring(n("x", 4), n("g", 3), True),
            "b": LayerWiring(n("g", 3), n("h", 5)),
            "c": LayerWiring(n("h", 5), n("y", 2), False, True),
        },
        [
            (4, "input", 0, "a", None),
            (3, "hidden", 1, "b", "a"),
            (5, "hidden", 2, "c", "b"),
            (2, "output", 3, None, "c"),
        ],
        [("a", 0, 1), ("b", 1, 2), ("c", 2, 3)],
    ),
    "one layer": Case(
        {"": LayerSpec(4, 2)},
        {"": LayerWiring(n("x", 4), n("y", 2), True, True)},
        [(4, "input", 0, "", None), (2, "output", 1, None, "")],
        [("", 0, 1)],
    ),
    "out of order": Case(
        {"last": LayerSpec(3, 2), "first": LayerSpec(4, 3)},
        {"first": LayerWiring(n("x", 4), n("h", 3), True), "last": LayerWiring(n("h", 3), n("y", 2), False, True)},
        [(4, "input", 0, "first", None), (3, "hidden", 1, "last", "first"), (2, "output", 2, None, "last")],
        [("first", 0, 1), ("last", 1, 2)],
    ),
    "two layers read one": Case(
        {"a": LayerSpec(4, 3), "b": LayerSpec(3, 2), "c": LayerSpec(3, 5)},
        {
            "a": LayerWiring(n("x", 4), n("h", 3), True),
            "b": LayerWiring(n("h", 3), n("y", 2), False, True),
            "c": LayerWiring(n("h", 3), n("z", 5), False, True),
        },
        [
            (4, "input", 0, "a", None),
            (3, "hidden", 1, None, "a", 0),
            (3, "hidden", 1, "b", None, 0),
            (2, "output", 2, None, "b"),
            (3, "hidden", 1, "c", None, 0),
            (5, "output", 2, None, "c"),
        ],
        [("a", 0, 1), ("b", 2, 3), ("c", 4, 5)],
        (3,),
    ),
    "nothing proven of the second": Case(
        {"a": LayerSpec(4, 3), "b": LayerSpec(3, 2)},
        {"a": LayerWiring(n("x", 4), n("h", 3), True), "b": LayerWiring()},
        [
            (4, "input", 0, "a", None),
            (3, "hidden", 1, None, "a"),
            (3, "hidden", 0, "b", None),
            (2, "hidden", 1, None, "b"),
        ],
        [("a", 0, 1), ("b", 2, 3)],
    ),
    "nothing known at all": Case(
        {"a": LayerSpec(4, 3), "b": LayerSpec(3, 2)},
        {},
        [
            (4, "hidden", 0, "a", None),
            (3, "hidden", 1, None, "a"),
            (3, "hidden", 0, "b", None),
            (2, "hidden", 1, None, "b"),
        ],
        [("a", 0, 1), ("b", 2, 3)],
    ),
    "two layers read the model's input": Case(
        {"a": LayerSpec(4, 3), "b": LayerSpec(4, 2)},
        {"a": LayerWiring(n("x", 4), n("g", 3), True), "b": LayerWiring(n("x", 4), n("h", 2), True)},
        [
            (4, "input", 0, "a", None),
            (3, "hidden", 1, None, "a"),
            (4, "input", 0, "b", None),
            (2, "hidden", 1, None, "b"),
        ],
        [("a", 0, 1), ("b", 2, 3)],
    ),
    "an output that is read on": Case(
        {"a": LayerSpec(4, 3), "b": LayerSpec(3, 2)},
        {"a": LayerWiring(n("x", 4), n("h", 3), True, True), "b": LayerWiring(n("h", 3), n("y", 2))},
        [(4, "input", 0, "a", None), (3, "hidden", 1, "b", "a"), (2, "hidden", 2, None, "b")],
        [("a", 0, 1), ("b", 1, 2)],
    ),
    "a writer that takes no part": Case(
        {"b": LayerSpec(3, 2)},
        {"a": LayerWiring(n("x", 4), n("h", 3), True), "b": LayerWiring(n("h", 3), n("y", 2), False, True)},
        [(3, "hidden", 0, "b", None), (2, "output", 1, None, "b")],
        [("b", 0, 1)],
    ),
    "widths that disagree": Case(
        {"a": LayerSpec(4, 3), "b": LayerSpec(6, 2)},
        {"a": LayerWiring(n("x", 4), n("h", 3), True), "b": LayerWiring(n("h", 3), n("y", 2), False, True)},
        [
            (4, "input", 0, "a", None),
            (3, "hidden", 1, None, "a"),
            (6, "hidden", 0, "b", None),
            (2, "output", 1, None, "b"),
        ],
        [("a", 0, 1), ("b", 2, 3)],
    ),
    "a circle": Case(
        {"a": LayerSpec(3, 3), "b": LayerSpec(3, 3)},
        {"a": LayerWiring(n("g", 3), n("h", 3)), "b": LayerWiring(n("h", 3), n("g", 3))},
        [(3, "hidden", 0, "a", "b"), (3, "hidden", 1, "b", "a")],
        [("a", 0, 1), ("b", 1, 0)],
    ),
    "a layer that reads what it writes": Case(
        {"a": LayerSpec(3, 3)},
        {"a": LayerWiring(n("h", 3), n("h", 3))},
        [(3, "hidden", 0, "a", None, 0), (3, "hidden", 0, None, "a", 0)],
        [("a", 0, 1)],
        (3,),
    ),
    "a residual sum": Case(
        {"a": LayerSpec(4, 3), "b": LayerSpec(3, 3), "c": LayerSpec(3, 2)},
        {
            "a": LayerWiring(n("x", 4), n("h", 3), True),
            "b": LayerWiring(n("h", 3), n("h", 3)),
            "c": LayerWiring(n("h", 3), n("y", 2), False, True),
        },
        [
            (4, "input", 0, "a", None),
            (3, "hidden", 1, None, "a", 0),
            (3, "hidden", 1, "b", None, 0),
            (3, "hidden", 1, None, "b", 0),
            (3, "hidden", 1, "c", None, 0),
            (2, "output", 2, None, "c"),
        ],
        [("a", 0, 1), ("b", 2, 3), ("c", 4, 5)],
        (3,),
    ),
    "neurons in another order": Case(
        {"a": LayerSpec(4, 3), "b": LayerSpec(3, 2)},
        {"a": LayerWiring(n("x", 4), n("h", 3)), "b": LayerWiring(("h2", "h0", "h1"), n("y", 2))},
        [
            (4, "hidden", 0, "a", None),
            (3, "hidden", 1, None, "a", 0),
            (3, "hidden", 1, "b", None, 0, (2, 0, 1)),
            (2, "hidden", 2, None, "b"),
        ],
        [("a", 0, 1), ("b", 2, 3)],
        (3,),
    ),
    "channels read for each of two positions": Case(
        {"a": LayerSpec(1, 2), "b": LayerSpec(4, 1)},
        {"a": LayerWiring(n("x", 1), n("h", 2)), "b": LayerWiring(("h0", "h0", "h1", "h1"), n("y", 1))},
        [
            (1, "hidden", 0, "a", None),
            (2, "hidden", 1, None, "a", 0),
            (4, "hidden", 1, "b", None, 0, (0, 0, 1, 1)),
            (1, "hidden", 2, None, "b"),
        ],
        [("a", 0, 1), ("b", 2, 3)],
        (2,),
    ),
    "a gate and what it gates": Case(
        {"a": LayerSpec(1, 4), "b": LayerSpec(2, 1)},
        {"a": LayerWiring(n("x", 1), n("h", 2) * 2), "b": LayerWiring(n("h", 2), n("y", 1))},
        [
            (1, "hidden", 0, "a", None),
            (4, "hidden", 1, None, "a", 0, (0, 1, 0, 1)),
            (2, "hidden", 1, "b", None, 0),
            (1, "hidden", 2, None, "b"),
        ],
        [("a", 0, 1), ("b", 2, 3)],
        (2,),
    ),
    "neurons that are all one": Case(
        {"a": LayerSpec(1, 2), "b": LayerSpec(2, 1)},
        {"a": LayerWiring(n("x", 1), ("h", "h")), "b": LayerWiring(("h", "h"), n("y", 1))},
        [
            (1, "hidden", 0, "a", None),
            (2, "hidden", 1, None, "a", 0, (0, 0)),
            (2, "hidden", 1, "b", None, 0, (0, 0)),
            (1, "hidden", 2, None, "b"),
        ],
        [("a", 0, 1), ("b", 2, 3)],
        (1,),
    ),
    "parts of a split": Case(
        {"a": LayerSpec(1, 3), "b": LayerSpec(2, 1), "c": LayerSpec(1, 1)},
        {
            "a": LayerWiring(n("x", 1), n("h", 3)),
            "b": LayerWiring(("h0", "h1"), n("y", 1)),
            "c": LayerWiring(("h2",), n("z", 1)),
        },
        [
            (1, "hidden", 0, "a", None),
            (3, "hidden", 1, None, "a", 0),
            (2, "hidden", 1, "b", None, 0, (0, 1)),
            (1, "hidden", 2, None, "b"),
            (1, "hidden", 1, "c", None, 0, (2,)),
            (1, "hidden", 2, None, "c"),
        ],
        [("a", 0, 1), ("b", 2, 3), ("c", 4, 5)],
        (3,),
    ),
    "two streams": Case(
        {"a": LayerSpec(2, 2), "b": LayerSpec(2, 2), "c": LayerSpec(2, 2)},
        {
            "a": LayerWiring(n("g", 2), n("h", 2)),
            "b": LayerWiring(n("h", 2), n("g", 2)),
            "c": LayerWiring(n("g", 2), n("h", 2)),
        },
        [
            (2, "hidden", 0, "a", None, 0),
            (2, "hidden", 1, None, "a", 1),
            (2, "hidden", 1, "b", None, 1),
            (2, "hidden", 0, None, "b", 0),
            (2, "hidden", 0, "c", None, 0),
            (2, "hidden", 1, None, "c", 1),
        ],
        [("a", 0, 1), ("b", 2, 3), ("c", 4, 5)],
        (2, 2),
    ),
    "a stream that the model returns": Case(
        {"a": LayerSpec(2, 2), "b": LayerSpec(2, 2)},
        {
            "a": LayerWiring(n("h", 2), n("h", 2), False, True),
            "b": LayerWiring(n("h", 2), n("h", 2), False, True),
        },
        [
            (2, "hidden", 0, "a", None, 0),
            (2, "output", 0, None, "a", 0),
            (2, "hidden", 0, "b", None, 0),
            (2, "output", 0, None, "b", 0),
        ],
        [("a", 0, 1), ("b", 2, 3)],
        (2,),
    ),
    "the model's input in a stream": Case(
        {"a": LayerSpec(2, 2)},
        {"a": LayerWiring(n("x", 2), n("x", 2), True)},
        [(2, "input", 0, "a", None, 0), (2, "hidden", 0, None, "a", 0)],
        [("a", 0, 1)],
        (2,),
    ),
    "a table": Case(
        {"t": LayerSpec(1, 3, structure="table", rows=9), "b": LayerSpec(3, 2)},
        {"t": LayerWiring(None, n("h", 3), True), "b": LayerWiring(n("h", 3), n("y", 2))},
        [(1, "hidden", 0, "t", None), (3, "hidden", 1, "b", "t"), (2, "hidden", 2, None, "b")],
        [("t", 0, 1, 1, "table", 9), ("b", 1, 2)],
    ),
    "a normalization between two layers": Case(
        {"a": LayerSpec(4, 3), "s": LayerSpec(3, 3, structure="diagonal"), "b": LayerSpec(3, 2)},
        {
            "a": LayerWiring(n("x", 4), n("h", 3), True),
            "s": LayerWiring(n("h", 3), n("h", 3)),
            "b": LayerWiring(n("h", 3), n("y", 2), False, True),
        },
        [
            (4, "input", 0, "a", None),
            (3, "hidden", 1, "b", "a"),
            (3, "hidden", 1, "s", "s"),
            (2, "output", 2, None, "b"),
        ],
        [("a", 0, 1), ("s", 2, 2, 1, "diagonal"), ("b", 1, 3)],
    ),
    "a normalization whose output is returned": Case(
        {"a": LayerSpec(4, 3), "s": LayerSpec(3, 3, structure="diagonal")},
        {
            "a": LayerWiring(n("x", 4), n("h", 3), True, True),
            "s": LayerWiring(n("h", 3), n("h", 3), False, True),
        },
        [(4, "input", 0, "a", None), (3, "output", 1, None, "a"), (3, "output", 1, "s", "s")],
        [("a", 0, 1), ("s", 2, 2, 1, "diagonal")],
    ),
    "groups": Case(
        {"a": LayerSpec(4, 2, groups=2)},
        {"a": LayerWiring(n("x", 4), n("y", 2), True, True)},
        [(4, "input", 0, "a", None), (2, "output", 1, None, "a")],
        [("a", 0, 1, 2)],
    ),
    "no layers": Case({}, {}, [], []),
}


@pytest.mark.parametrize("name", CASES)
def test_spaces_are_shared_where_it_is_proven_and_only_there(name: str) -> None:
    case = CASES[name]
    found = infer_spaces(case.specs, case.wiring)
    assert found.spaces == tuple(NeuronSpace(*space) for space in case.spaces)
    assert found.layers == tuple(LayerPorts(*ports) for ports in case.layers)
    assert found.streams == case.streams


@pytest.mark.parametrize("name", CASES)
def test_what_neurons_are_called_is_immaterial(name: str) -> None:
    case = CASES[name]

    def renamed(names: tuple[Hashable, ...] | None) -> tuple[Hashable, ...] | None:
        return None if names is None else tuple(("another name", each) for each in names)

    others = {
        layer: known._replace(inputs=renamed(known.inputs), outputs=renamed(known.outputs))
        for layer, known in case.wiring.items()
    }
    assert infer_spaces(case.specs, others) == infer_spaces(case.specs, case.wiring)


@pytest.mark.parametrize("seed", range(60))
def test_streams_are_the_sets_that_have_a_neuron_in_common_and_readers_and_writers(seed: int) -> None:
    specs, wiring = random_wiring(seed)
    found = infer_spaces(specs, wiring)
    for ports in found.layers:
        reader, writer = found.spaces[ports.input_space], found.spaces[ports.output_space]
        assert reader.reader == writer.writer == ports.name
        assert (reader.width, writer.width) == specs[ports.name][:2]
    pairs = {(space.reader, space.writer) for space in found.spaces if space.reader != space.writer}
    lent = {
        (ports.name, side): found.spaces[space]
        for ports in found.layers
        for side, space in (("input", ports.input_space), ("output", ports.output_space))
        if found.spaces[space].stream is not None
    }
    wanted = reference.streams(specs, wiring)
    lending = [stream for stream in wanted if not reference.is_pair(stream)]
    assert lent.keys() == {port for stream in lending for port in stream if port[1] != "scaled"}
    assert len(found.streams) == len(lending)
    for stream in lending:
        (number,) = {lent[port].stream for port in stream if port in lent}
        assert found.streams[number] == len(set(reference.names_in(stream)))
        members = [
            (name, member)
            for port in stream
            if port in lent
            for name, member in zip(stream[port], lent[port].members or range(lent[port].width), strict=True)
        ]
        assert len(set(members)) == len({name for name, _ in members}) == len({member for _, member in members})
    for stream in (stream for stream in wanted if reference.is_pair(stream)):
        sides = {side: layer for layer, side in stream}
        assert (sides["input"], sides["output"]) in pairs


def test_a_plain_network_has_the_spaces_of_a_chain() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    with GradientCapture(model) as capture:
        model(torch.randn(6, 4))
    specs = {"0": LayerSpec(4, 3), "2": LayerSpec(3, 5), "4": LayerSpec(5, 2)}
    found, expected = infer_spaces(specs, capture.wiring()), chain_spaces([4, 3, 5, 2])
    assert found.widths == expected.widths
    assert [(s.kind, s.depth) for s in found.spaces] == [(s.kind, s.depth) for s in expected.spaces]


def test_spaces_find_places_and_layers_and_can_be_keys() -> None:
    spaces = chain_spaces([4, 3, 2])
    assert [spaces.place(k) for k in range(3)] == [slice(0, 4), slice(4, 7), slice(7, 9)] and spaces.size == 9
    assert spaces.layer("1") == LayerPorts("1", 1, 2)
    assert hash(spaces) == hash(chain_spaces([4, 3, 2])) and spaces == chain_spaces([4, 3, 2])
    assert spaces != chain_spaces([4, 3, 3]) and spaces != NeuronSpaces(spaces.spaces, spaces.layers, (3,))
    with pytest.raises(KeyError):
        spaces.layer("2")
