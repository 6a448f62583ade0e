"""Neuron spaces are shared only where that is proven, and their features do not depend on the order of data points."""

import pytest
import torch
from torch import Tensor, nn

from gmn_optim.capture import GradientCapture
from gmn_optim.capture.flow import LayerFlow
from gmn_optim.gradients import DecomposedGradient
from gmn_optim.neurons import LayerPorts, NeuronSpace, NeuronSpaces, chain_spaces, gather_neurons, infer_spaces
from tests import reference

FIRST = LayerFlow(source=None, reads_model_input=True, is_model_output=False)
INNER = LayerFlow(source=None, reads_model_input=False, is_model_output=False)


def after(source: str, last: bool = False) -> LayerFlow:
    """Return the flow of a layer that reads another one."""
    return LayerFlow(source=source, reads_model_input=False, is_model_output=last)


WIRINGS = {
    "chain": (
        {"a": (4, 3), "b": (3, 5), "c": (5, 2)},
        {"a": FIRST, "b": after("a"), "c": after("b", last=True)},
        [
            (4, "input", 0, "a", None),
            (3, "hidden", 1, "b", "a"),
            (5, "hidden", 2, "c", "b"),
            (2, "output", 3, None, "c"),
        ],
        [("a", 0, 1), ("b", 1, 2), ("c", 2, 3)],
    ),
    "one layer": (
        {"": (4, 2)},
        {"": LayerFlow(None, True, True)},
        [(4, "input", 0, "", None), (2, "output", 1, None, "")],
        [("", 0, 1)],
    ),
    "out of order": (
        {"last": (3, 2), "first": (4, 3)},
        {"first": FIRST, "last": after("first", last=True)},
        [(4, "input", 0, "first", None), (3, "hidden", 1, "last", "first"), (2, "output", 2, None, "last")],
        [("first", 0, 1), ("last", 1, 2)],
    ),
    "branch: two layers read one": (
        {"a": (4, 3), "b": (3, 2), "c": (3, 5)},
        {"a": FIRST, "b": after("a", last=True), "c": after("a", last=True)},
        [
            (4, "input", 0, "a", None),
            (3, "hidden", 1, "c", "a"),
            (2, "output", 2, None, "b"),
            (5, "output", 2, None, "c"),
        ],
        [("a", 0, 1), ("b", 1, 2), ("c", 1, 3)],
    ),
    "nothing proven of the second": (
        {"a": (4, 3), "b": (3, 2)},
        {"a": FIRST, "b": INNER},
        [
            (4, "input", 0, "a", None),
            (3, "hidden", 1, None, "a"),
            (3, "hidden", 0, "b", None),
            (2, "hidden", 1, None, "b"),
        ],
        [("a", 0, 1), ("b", 2, 3)],
    ),
    "no flows at all": (
        {"a": (4, 3), "b": (3, 2)},
        {},
        [
            (4, "hidden", 0, "a", None),
            (3, "hidden", 1, None, "a"),
            (3, "hidden", 0, "b", None),
            (2, "hidden", 1, None, "b"),
        ],
        [("a", 0, 1), ("b", 2, 3)],
    ),
    "two layers read the model's input": (
        {"a": (4, 3), "b": (4, 2)},
        {"a": FIRST, "b": FIRST},
        [
            (4, "input", 0, "a", None),
            (3, "hidden", 1, None, "a"),
            (4, "input", 0, "b", None),
            (2, "hidden", 1, None, "b"),
        ],
        [("a", 0, 1), ("b", 2, 3)],
    ),
    "an output that is read on": (
        {"a": (4, 3), "b": (3, 2)},
        {"a": LayerFlow(None, True, True), "b": after("a")},
        [(4, "input", 0, "a", None), (3, "hidden", 1, "b", "a"), (2, "hidden", 2, None, "b")],
        [("a", 0, 1), ("b", 1, 2)],
    ),
    "a source that was not captured": (
        {"b": (3, 2)},
        {"b": after("a", last=True)},
        [(3, "hidden", 0, "b", None), (2, "output", 1, None, "b")],
        [("b", 0, 1)],
    ),
    "widths that disagree": (
        {"a": (4, 3), "b": (6, 2)},
        {"a": FIRST, "b": after("a", last=True)},
        [
            (4, "input", 0, "a", None),
            (3, "hidden", 1, None, "a"),
            (6, "hidden", 0, "b", None),
            (2, "output", 1, None, "b"),
        ],
        [("a", 0, 1), ("b", 2, 3)],
    ),
    "a circle": (
        {"a": (3, 3), "b": (3, 3)},
        {"a": after("b"), "b": after("a")},
        [(3, "hidden", 0, "a", None), (3, "hidden", 1, "b", "a"), (3, "hidden", 2, None, "b")],
        [("a", 0, 1), ("b", 1, 2)],
    ),
    "no layers": ({}, {}, [], []),
}


@pytest.mark.parametrize("wiring", WIRINGS)
def test_spaces_are_shared_where_it_is_proven_and_only_there(wiring: str) -> None:
    widths, flows, spaces, layers = WIRINGS[wiring]
    found = infer_spaces(widths, flows)
    assert [(s.width, s.kind, s.depth, s.reader, s.writer) for s in found.spaces] == spaces
    assert found.layers == tuple(LayerPorts(*ports) for ports in layers)


def test_a_plain_network_has_the_spaces_of_a_chain() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    with GradientCapture(model) as capture:
        model(torch.randn(6, 4))
    found = infer_spaces({"0": (4, 3), "2": (3, 5), "4": (5, 2)}, capture.flows())
    expected = chain_spaces([4, 3, 5, 2])
    assert found.widths == expected.widths
    assert [(s.kind, s.depth) for s in found.spaces] == [(s.kind, s.depth) for s in expected.spaces]


def test_spaces_find_places_and_layers_and_can_be_keys() -> None:
    spaces = chain_spaces([4, 3, 2])
    assert [spaces.place(k) for k in range(3)] == [slice(0, 4), slice(4, 7), slice(7, 9)] and spaces.size == 9
    assert spaces.layer("1") == LayerPorts("1", 1, 2)
    assert hash(spaces) == hash(chain_spaces([4, 3, 2])) and spaces == chain_spaces([4, 3, 2])
    assert spaces != chain_spaces([4, 3, 3])
    with pytest.raises(KeyError):
        spaces.layer("2")


# ---------------------------------------------------------------------- gather_neurons

CHAIN = chain_spaces([4, 3, 2])


def draw(points: int, positions: int = 1, spaces: NeuronSpaces = CHAIN, seed: int = 0) -> dict[str, DecomposedGradient]:
    """Return random factors of every layer."""
    generator = torch.Generator().manual_seed(seed)
    return {
        ports.name: DecomposedGradient(
            *(
                torch.randn(points, positions, spaces.widths[space], dtype=torch.float64, generator=generator)
                for space in (ports.input_space, ports.output_space)
            )
        )
        for ports in spaces.layers
    }


def mapped(gradients: dict[str, DecomposedGradient], function: object) -> dict[str, DecomposedGradient]:
    """Apply a function to every factor."""
    return {name: DecomposedGradient(*map(function, gradient)) for name, gradient in gradients.items()}


SHAPES = {"as many": (8, 1), "more": (19, 1), "fewer": (3, 1), "one": (1, 1), "three axes": (5, 4), "odd": (7, 3)}


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_the_quantiles_of_the_backprops_that_sorting_a_list_gives(shape: str) -> None:
    gradients = draw(*SHAPES[shape])
    rows = reference.quantile_rows(list(gradients.values()), 8)
    (a0, g0), (a1, g1) = (tuple(f.flatten(0, 1)[rows] for f in gradients[name]) for name in ("0", "1"))
    factors = gather_neurons(gradients, CHAIN, 8).factors
    assert factors.shape == (8, 9, 2)
    assert torch.equal(factors[..., 0], torch.cat([a0, a1, torch.zeros(8, 2, dtype=torch.float64)], dim=1))
    assert torch.equal(factors[..., 1], torch.cat([torch.zeros(8, 4, dtype=torch.float64), g0, g1], dim=1))


@pytest.mark.parametrize("shape", SHAPES)
def test_moments_are_means_over_all_rows(shape: str) -> None:
    gradients = draw(*SHAPES[shape])
    moments = gather_neurons(gradients, CHAIN, 8).moments
    hidden_a, hidden_g = gradients["1"].activations.flatten(0, 1), gradients["0"].backprops.flatten(0, 1)
    expected = [hidden_a.mean(0), hidden_a.square().mean(0), hidden_g.mean(0), hidden_g.square().mean(0)]
    torch.testing.assert_close(moments[4:7], torch.stack(expected, dim=-1), rtol=1e-12, atol=1e-12)
    assert not moments[:4, 2:].any() and not moments[7:, :2].any()
    assert moments[:4, :2].all() and moments[7:, 2:].all()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_order_of_data_points_is_immaterial(shape: str) -> None:
    gradients = draw(*SHAPES[shape])
    order = torch.randperm(SHAPES[shape][0], generator=torch.Generator().manual_seed(1))
    found = gather_neurons(mapped(gradients, lambda f: f[order]), CHAIN, 8)
    expected = gather_neurons(gradients, CHAIN, 8)
    assert torch.equal(found.factors, expected.factors)
    torch.testing.assert_close(found.moments, expected.moments, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("silent", [3, 5, 7])
def test_data_points_without_gradient_may_stand_in_any_order(silent: int) -> None:
    gradients, order = draw(8), torch.tensor([7, 2, 5, 0, 3, 6, 1, 4])
    for each in gradients.values():
        each.backprops[:silent] = 0.0
    found, expected = (gather_neurons(mapped(gradients, lambda f, o=o: f[o]), CHAIN, 5) for o in (order, range(8)))
    assert torch.equal(found.factors, expected.factors)


def test_positions_are_rows_like_data_points() -> None:
    gradients = draw(5, 4)
    as_points = mapped(gradients, lambda f: f.flatten(0, 1).unsqueeze(1))
    for found, expected in zip(gather_neurons(gradients, CHAIN, 8), gather_neurons(as_points, CHAIN, 8), strict=True):
        assert torch.equal(found, expected)


def test_a_set_given_twice_has_the_same_features() -> None:
    gradients = draw(8)
    doubled = mapped(gradients, lambda f: f.repeat(2, 1, 1))
    for found, expected in zip(gather_neurons(doubled, CHAIN, 8), gather_neurons(gradients, CHAIN, 8), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_layers_with_different_numbers_of_rows_choose_by_themselves() -> None:
    gradients = {"0": draw(5, 4)["0"], "1": draw(6, 1)["1"]}
    factors = gather_neurons(gradients, CHAIN, 8).factors
    rows = {name: reference.quantile_rows([gradients[name]], 8) for name in gradients}
    assert torch.equal(factors[:, 4:7, 1], gradients["0"].backprops.flatten(0, 1)[rows["0"]])
    assert torch.equal(factors[:, 4:7, 0], gradients["1"].activations.flatten(0, 1)[rows["1"]])


def test_layers_with_equal_numbers_of_rows_choose_the_same_data_points() -> None:
    gradients = draw(19)
    labels = torch.arange(19.0, dtype=torch.float64)[:, None, None]
    marked = {name: each._replace(activations=labels.expand_as(each.activations)) for name, each in gradients.items()}
    factors = gather_neurons(marked, CHAIN, 8).factors
    assert torch.equal(factors[:, 0, 0], factors[:, 4, 0])


def test_features_of_permuted_neurons_are_permuted() -> None:
    gradients, order = draw(11), torch.tensor([2, 0, 1])
    moved = {
        "0": gradients["0"]._replace(backprops=gradients["0"].backprops[..., order]),
        "1": gradients["1"]._replace(activations=gradients["1"].activations[..., order]),
    }
    everywhere = torch.cat([torch.arange(4), 4 + order, torch.tensor([7, 8])])
    found, expected = gather_neurons(moved, CHAIN, 8), gather_neurons(gradients, CHAIN, 8)
    assert torch.equal(found.factors, expected.factors[:, everywhere])
    assert torch.equal(found.moments, expected.moments[everywhere])


def test_unshared_ports_have_one_factor_each() -> None:
    spaces = infer_spaces({"a": (4, 3), "b": (3, 2)}, {})
    factors = gather_neurons(draw(6, spaces=spaces), spaces, 6).factors
    for number, space in enumerate(spaces.spaces):
        part = factors[:, spaces.place(number)]
        assert part[..., 0].any() == (space.reader is not None)
        assert part[..., 1].any() == (space.writer is not None)


def test_a_space_with_two_readers_has_the_activations_of_the_last() -> None:
    spaces = NeuronSpaces(
        (
            NeuronSpace(4, "input", 0, reader="b"),
            NeuronSpace(3, "hidden", 1, None, "a"),
            NeuronSpace(2, "hidden", 1, None, "b"),
        ),
        (LayerPorts("a", 0, 1), LayerPorts("b", 0, 2)),
    )
    gradients = draw(6, spaces=spaces)
    rows = reference.quantile_rows(list(gradients.values()), 6)
    found = gather_neurons(gradients, spaces, 6).factors[:, :4, 0]
    assert torch.equal(found, gradients["b"].activations.flatten(0, 1)[rows])


def test_zero_backprops_give_no_nan() -> None:
    gradients = mapped(draw(6), torch.zeros_like)
    assert not any(part.any() or part.isnan().any() for part in gather_neurons(gradients, CHAIN, 8))


def test_it_maps_over_tasks() -> None:
    tasks = [draw(6, 2, seed=seed) for seed in range(3)]
    stacked = {
        name: tuple(torch.stack(factor) for factor in zip(*(task[name] for task in tasks), strict=True))
        for name in ("0", "1")
    }

    def gather(factors: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        gradients = {name: DecomposedGradient(*pair) for name, pair in factors.items()}
        return tuple(gather_neurons(gradients, CHAIN, 8))

    for k, task in enumerate(tasks):
        for found, expected in zip(torch.func.vmap(gather)(stacked), gather_neurons(task, CHAIN, 8), strict=True):
            torch.testing.assert_close(found[k], expected, rtol=1e-12, atol=1e-12)
