"""What is remembered of factors are moving averages, and what is read from them has no scale."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gmn_optim.neuron_sets import NeuronSets
from gmn_optim.neurons import LayerSpec, LayerWiring, NeuronSpaces, chain_spaces
from gmn_optim.rule.features import DECAYS
from gmn_optim.rule.memory import AbstractFactorMemory, factor_memories
from gmn_optim.streams import infer_spaces
from gmn_optim.testing import permute_neurons, random_permutations
from tests import reference

SPACES = chain_spaces([4, 3, 2])
ROWS = 5
NAMES = list(factor_memories)


def draw(steps: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> list[NeuronSets]:
    """Return random features of neurons for a number of steps, of a possible scale."""
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(steps):
        rows = torch.randn(20, SPACES.size, 2, dtype=dtype, generator=generator) * scale
        rows[:, SPACES.place(0), 1] = 0.0
        rows[:, SPACES.place(2), 0] = 0.0
        pairs = [part for k in (0, 1) for part in (rows[..., k].mean(0), rows[..., k].square().mean(0))]
        drawn.append(NeuronSets(rows[:ROWS], torch.stack(pairs, dim=-1)))
    return drawn


def run(memory: AbstractFactorMemory, sets: list[NeuronSets]) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Yield features over sets, features of neurons, and the state, after each step."""
    state = memory.init(SPACES, ROWS, sets[0].factors)
    for number, each in enumerate(sets):
        step = torch.tensor(float(number + 1), dtype=each.factors.dtype)
        features, state = memory.update(state, each, SPACES, step)
        yield features.sets, features.neurons, state


@pytest.mark.parametrize("name", NAMES)
def test_features_have_the_promised_channels(name: str) -> None:
    memory = factor_memories[name]()
    for sets, neurons, _ in run(memory, draw(2)):
        assert sets.shape == (ROWS, SPACES.size, memory.set_channels)
        assert (neurons is None) == (memory.neuron_channels == 0)
        assert neurons is None or neurons.shape == (SPACES.size, memory.neuron_channels)


def test_slots_remember_six_averages_of_every_row() -> None:
    sets = draw(7)
    *_, (_, _, state) = run(factor_memories["slots"](), sets)
    for row, neuron, factor in ((0, 0, 0), (2, 5, 1), (4, 8, 1), (1, 4, 0)):
        values = [each.factors[row, neuron, factor].item() for each in sets]
        expected = [reference.moving_average(values, decay) for decay in DECAYS]
        assert state[row, neuron, factor].tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_moments_remember_six_averages_of_every_mean() -> None:
    sets = draw(7)
    *_, (_, _, state) = run(factor_memories["moments"](), sets)
    for neuron, moment in ((0, 0), (2, 1), (8, 2), (5, 3)):
        values = [each.moments[neuron, moment].item() for each in sets]
        expected = [reference.moving_average(values, decay) for decay in DECAYS]
        assert state[neuron, moment].tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_slot_features_are_current_and_remembered_factors_divided_by_their_size_in_each_space() -> None:
    sets = draw(3)
    *_, (features, _, state) = run(factor_memories["slots"](), sets)
    stacked = torch.cat([sets[-1].factors, state.flatten(-2)], dim=-1)
    for number in range(3):
        for channel in range(14):
            part = stacked[:, SPACES.place(number), channel]
            size = reference.root_mean_square(part.flatten().tolist())
            expected = part / size if size else part
            torch.testing.assert_close(features[:, SPACES.place(number), channel], expected, rtol=1e-9, atol=1e-12)


def test_moment_features_are_relative_size_and_signal_against_noise() -> None:
    sets = draw(4)
    *_, (_, neurons, _) = run(factor_memories["moments"](), sets)
    neurons = neurons.view(SPACES.size, 2, 2, 7)  # (size or ratio, a or g, now and six decays)
    for number, factor in ((0, 0), (1, 0), (1, 1), (2, 1)):
        for column, decay in enumerate((0.0, *DECAYS)):
            first, second = (
                [
                    reference.moving_average([s.moments[n, 2 * factor + k].item() for s in sets], decay)
                    / (1 - decay**4)
                    for n in range(*SPACES.place(number).indices(SPACES.size))
                ]
                for k in (0, 1)
            )
            roots = [value**0.5 for value in second]
            size = reference.root_mean_square(roots)
            part = neurons[SPACES.place(number), :, factor, column]
            assert part[:, 0].tolist() == pytest.approx([root / size for root in roots], rel=1e-9)
            ratios = [mean / root for mean, root in zip(first, roots, strict=True)]
            assert part[:, 1].tolist() == pytest.approx(ratios, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("name", NAMES)
def test_scaled_factors_have_the_same_features(name: str, scale: float) -> None:
    memory = factor_memories[name]()
    for found, expected in zip(run(memory, draw(3, scale)), run(memory, draw(3)), strict=True):
        for one, other in zip(found[:2], expected[:2], strict=True):
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12])
@pytest.mark.parametrize("name", NAMES)
def test_vanishing_factors_give_no_nan(name: str, scale: float, dtype: torch.dtype) -> None:
    for features in run(factor_memories[name](), draw(3, scale, dtype)):
        assert all(part is None or part.isfinite().all() for part in features)
        if scale == 0.0:
            assert all(part is None or not part.any() for part in features)


@pytest.mark.parametrize("name", NAMES)
def test_features_of_permuted_neurons_are_permuted(name: str) -> None:
    order = random_permutations(SPACES, torch.Generator().manual_seed(1))
    memory, sets = factor_memories[name](), draw(3)
    moved = [NeuronSets(*(permute_neurons(part, SPACES, order) for part in each)) for each in sets]
    for found, expected in zip(run(memory, moved), run(memory, sets), strict=True):
        for one, other in zip(found[:2], expected[:2], strict=True):
            if one is not None:
                torch.testing.assert_close(one, permute_neurons(other, SPACES, order), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_leaves_the_old_state_as_it_was(name: str) -> None:
    memory, sets = factor_memories[name](), draw(2)
    state = memory.init(SPACES, ROWS, sets[0].factors)
    memory.update(state, sets[0], SPACES, torch.tensor(1.0, dtype=torch.float64))
    assert not state.any()


RESIDUAL = infer_spaces(
    {
        "table": LayerSpec(1, 3, structure="table", rows=7),
        "norm": LayerSpec(3, 3, structure="diagonal"),
        "up": LayerSpec(3, 4),
        "down": LayerSpec(4, 3),
        "head": LayerSpec(3, 2),
    },
    {
        "table": LayerWiring(None, (0, 1, 2)),
        "norm": LayerWiring((0, 1, 2), (0, 1, 2)),
        "up": LayerWiring((0, 1, 2), (3, 4, 5, 6)),
        "down": LayerWiring((3, 4, 5, 6), (0, 1, 2)),
        "head": LayerWiring((0, 1, 2), (7, 8), False, True),
    },
)
WIRINGS = {"chain": SPACES, "residual": RESIDUAL}


def halves(memory: AbstractFactorMemory, state: Tensor, spaces: NeuronSpaces, space: int, half: int) -> Tensor:
    """Return a copy of the activations' half (0) or the backprops' half (1) of a space's memory."""
    of_space = state.movedim(memory.neuron_axis, 0)[spaces.place(space)].movedim(0, memory.neuron_axis)
    return of_space.unflatten(memory.neuron_axis + 1, (2, -1)).select(memory.neuron_axis + 1, half)


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("name", NAMES)
def test_of_layer_gives_views_of_a_layers_own_halves_and_of_what_was_lent(name: str, wiring: str) -> None:
    memory, spaces = factor_memories[name](), WIRINGS[wiring]
    state = torch.randn_like(memory.init(spaces, ROWS, torch.zeros((), dtype=torch.float64)))
    for ports in spaces.layers:
        of_input, of_output = (spaces.spaces[space] for space in (ports.input_space, ports.output_space))
        wanted = {"memory_of_activations": (ports.input_space, 0), "memory_of_backprops": (ports.output_space, 1)}
        wanted |= {"memory_lent_backprops": (ports.input_space, 1)} if of_input.writer is None else {}
        wanted |= {"memory_lent_activations": (ports.output_space, 0)} if of_output.reader is None else {}
        views = memory.of_layer(state, spaces, ports)
        assert views.keys() == wanted.keys()
        for key, place in wanted.items():
            assert torch.equal(views[key].reshape(-1), halves(memory, state, spaces, *place).reshape(-1))


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("name", NAMES)
def test_all_of_the_memory_is_in_one_view_and_no_more_than_one(name: str, wiring: str) -> None:
    memory, spaces = factor_memories[name](), WIRINGS[wiring]
    state = memory.init(spaces, ROWS, torch.zeros(()))
    for ports in spaces.layers:
        for view in memory.of_layer(state, spaces, ports).values():
            view.add_(1.0)  # writing through a view reaches the state
    assert torch.equal(state, torch.ones_like(state))


@pytest.mark.parametrize("name", NAMES)
def test_memory_has_the_dtype_it_is_given(name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        assert factor_memories[name]().init(SPACES, ROWS, torch.zeros((), dtype=dtype)).dtype == dtype
