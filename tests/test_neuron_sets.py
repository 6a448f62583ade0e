"""Features of neurons do not depend on the order of data points, and ports of a stream borrow what they lack."""

import pytest
import torch
from torch import Tensor

from gmn_optim.gradients import DecomposedGradient
from gmn_optim.neuron_sets import gather_neurons
from gmn_optim.neurons import LayerPorts, LayerSpec, LayerWiring, NeuronSpace, NeuronSpaces, chain_spaces
from gmn_optim.streams import infer_spaces
from tests import reference
from tests.cases import random_wiring

CHAIN = chain_spaces([4, 3, 2])


def draw(points: int, positions: int = 1, spaces: NeuronSpaces = CHAIN, seed: int = 0) -> dict[str, DecomposedGradient]:
    """Return random factors of every layer; those of a table are the numbers of its rows."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for ports in spaces.layers:
        a, g = (
            torch.randn(points, positions, spaces.widths[space], dtype=torch.float64, generator=generator)
            for space in (ports.input_space, ports.output_space)
        )
        drawn[ports.name] = DecomposedGradient((a * 10).long().abs() if ports.structure == "table" else a, g)
    return drawn


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
    spaces = infer_spaces({"a": LayerSpec(4, 3), "b": LayerSpec(3, 2)}, {})
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


# ---------------------------------------------------------------------- tables, scales, streams


def test_the_neuron_that_stands_for_a_tables_rows_has_activation_one() -> None:
    spaces = infer_spaces({"t": LayerSpec(1, 3, structure="table", rows=9)}, {})
    gradients = draw(6, 2, spaces=spaces)
    found = gather_neurons(gradients, spaces, 4)
    assert torch.equal(found.factors[:, 0, 0], torch.ones(4, dtype=torch.float64))
    assert torch.equal(found.moments[0, :2], torch.ones(2, dtype=torch.float64))
    rows = reference.quantile_rows(list(gradients.values()), 4)
    assert torch.equal(found.factors[:, 1:, 1], gradients["t"].backprops.flatten(0, 1)[rows])


def test_neurons_that_a_layer_scales_have_both_factors() -> None:
    spaces = infer_spaces({"s": LayerSpec(3, 3, structure="diagonal")}, {})
    gradients = draw(6, 2, spaces=spaces)
    rows = reference.quantile_rows(list(gradients.values()), 4)
    a, g = (factor.flatten(0, 1)[rows] for factor in gradients["s"])
    assert torch.equal(gather_neurons(gradients, spaces, 4).factors, torch.stack([a, g], dim=-1))


RESIDUAL = infer_spaces(
    {"a": LayerSpec(4, 3), "b": LayerSpec(3, 3), "c": LayerSpec(3, 2)},
    {
        "a": LayerWiring((0, 1, 2, 3), (4, 5, 6), True),
        "b": LayerWiring((4, 5, 6), (4, 5, 6)),
        "c": LayerWiring((4, 5, 6), (7, 8), False, True),
    },
)


def test_who_reads_a_stream_borrows_the_mean_of_its_backprops_and_who_writes_it_that_of_its_activations() -> None:
    gradients = draw(6, spaces=RESIDUAL)
    rows = reference.quantile_rows(list(gradients.values()), 6)
    a, g = ({name: factors[k].squeeze(1) for name, factors in gradients.items()} for k in (0, 1))
    written, read = (g["a"] + g["b"]) / 2, (a["b"] + a["c"]) / 2
    found = gather_neurons(gradients, RESIDUAL, 6)
    own = {"a": (read, g["a"]), "b": (read, g["b"])}
    for name, pair in own.items():
        place = RESIDUAL.place(RESIDUAL.layer(name).output_space)
        torch.testing.assert_close(found.factors[:, place], torch.stack(pair, -1)[rows], rtol=1e-12, atol=1e-12)
    for name in ("b", "c"):
        place = RESIDUAL.place(RESIDUAL.layer(name).input_space)
        expected = torch.stack([a[name], written], -1)[rows]
        torch.testing.assert_close(found.factors[:, place], expected, rtol=1e-12, atol=1e-12)
        squares = (g["a"].square().mean(0) + g["b"].square().mean(0)) / 2
        torch.testing.assert_close(found.moments[place, 3], squares, rtol=1e-12, atol=1e-12)


WIRINGS = {
    "residual sum": RESIDUAL,
    "channels read for each of their positions": infer_spaces(
        {"a": LayerSpec(2, 3), "b": LayerSpec(6, 2), "c": LayerSpec(3, 2)},
        {
            "a": LayerWiring(None, (0, 1, 2)),
            "b": LayerWiring((0, 0, 1, 1, 2, 2), None),
            "c": LayerWiring((2, 0, 1), None),
        },
    ),
    "gate": infer_spaces(
        {"a": LayerSpec(2, 6), "b": LayerSpec(3, 2)},
        {"a": LayerWiring(None, (0, 1, 2, 0, 1, 2)), "b": LayerWiring((0, 1, 2), None)},
    ),
    "parts": infer_spaces(
        {"a": LayerSpec(2, 4), "b": LayerSpec(3, 1), "c": LayerSpec(3, 2)},
        {
            "a": LayerWiring((8, 9), (0, 1, 2, 3)),
            "b": LayerWiring((0, 8, 9), None),
            "c": LayerWiring((1, 2, 5), None),
        },
    ),
    "language model": infer_spaces(
        {
            "t": LayerSpec(1, 3, structure="table", rows=9),
            "s": LayerSpec(3, 3, structure="diagonal"),
            "b": LayerSpec(3, 3),
            "h": LayerSpec(3, 9),
        },
        {
            "t": LayerWiring(None, (0, 1, 2)),
            "s": LayerWiring((0, 1, 2), (0, 1, 2)),
            "b": LayerWiring((0, 1, 2), (0, 1, 2)),
            "h": LayerWiring((0, 1, 2), None, False, True),
        },
    ),
    **{f"random {seed}": infer_spaces(*random_wiring(seed)) for seed in range(12)},
}


@pytest.mark.parametrize("shape", [(7, 1), (5, 3), (2, 1)])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_features_of_streams_are_those_of_a_loop_over_ports_and_members(wiring: str, shape: tuple[int, int]) -> None:
    spaces = WIRINGS[wiring]
    gradients = draw(*shape, spaces=spaces)
    factors, moments = reference.neuron_sets(gradients, spaces, 4)
    found = gather_neurons(gradients, spaces, 4)
    torch.testing.assert_close(found.factors, torch.tensor(factors, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.moments, torch.tensor(moments, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wiring", WIRINGS)
def test_layers_of_a_stream_with_different_numbers_of_rows_lend_their_own(wiring: str) -> None:
    spaces = WIRINGS[wiring]
    gradients = {name: draw(5, 2 + k % 2, spaces=spaces)[name] for k, name in enumerate(draw(1, spaces=spaces))}
    factors, moments = reference.neuron_sets(gradients, spaces, 4)
    found = gather_neurons(gradients, spaces, 4)
    torch.testing.assert_close(found.factors, torch.tensor(factors, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.moments, torch.tensor(moments, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wiring", WIRINGS)
def test_the_order_of_data_points_is_immaterial_to_streams(wiring: str) -> None:
    gradients, order = draw(7, 2, spaces=WIRINGS[wiring]), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    found = gather_neurons(mapped(gradients, lambda f: f[order]), WIRINGS[wiring], 4)
    expected = gather_neurons(gradients, WIRINGS[wiring], 4)
    assert torch.equal(found.factors, expected.factors)
    torch.testing.assert_close(found.moments, expected.moments, rtol=1e-12, atol=1e-12)


def test_features_of_a_permuted_stream_are_permuted_at_every_port() -> None:
    gradients, order = draw(11, spaces=RESIDUAL), torch.tensor([2, 0, 1])
    moved = {
        "a": gradients["a"]._replace(backprops=gradients["a"].backprops[..., order]),
        "b": DecomposedGradient(*(factor[..., order] for factor in gradients["b"])),
        "c": gradients["c"]._replace(activations=gradients["c"].activations[..., order]),
    }
    starts = [RESIDUAL.place(number).start for number in range(len(RESIDUAL.spaces))]
    everywhere = torch.cat([start + (order if k in (1, 2, 3, 4) else torch.arange(w)) for k, (start, w) in enumerate(
        zip(starts, RESIDUAL.widths, strict=True))])  # fmt: skip
    found, expected = gather_neurons(moved, RESIDUAL, 8), gather_neurons(gradients, RESIDUAL, 8)
    assert torch.equal(found.factors, expected.factors[:, everywhere])
    assert torch.equal(found.moments, expected.moments[everywhere])


def test_members_of_a_stream_that_nobody_writes_borrow_nothing() -> None:
    spaces, gradients = WIRINGS["parts"], draw(6, spaces=WIRINGS["parts"])
    place = spaces.place(spaces.layer("c").input_space)
    found = gather_neurons(gradients, spaces, 4)
    assert found.factors[:, place, 1][:, :2].all() and not found.factors[:, place, 1][:, 2].any()
    assert not found.moments[place, 2:][2].any()


@pytest.mark.parametrize("wiring", ["chain", *WIRINGS])
def test_it_maps_over_tasks(wiring: str) -> None:
    spaces = {"chain": CHAIN, **WIRINGS}[wiring]
    tasks = [draw(6, 2, spaces=spaces, seed=seed) for seed in range(3)]
    stacked = {
        name: tuple(torch.stack(factor) for factor in zip(*(task[name] for task in tasks), strict=True))
        for name in tasks[0]
    }

    def gather(factors: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        gradients = {name: DecomposedGradient(*pair) for name, pair in factors.items()}
        return tuple(gather_neurons(gradients, spaces, 8))

    for k, task in enumerate(tasks):
        for found, expected in zip(torch.func.vmap(gather)(stacked), gather_neurons(task, spaces, 8), strict=True):
            torch.testing.assert_close(found[k], expected, rtol=1e-12, atol=1e-12)
