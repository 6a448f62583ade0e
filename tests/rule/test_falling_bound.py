"""The bound of a controller's pace: when it falls, and how far."""

import math

import pytest
import torch

from gmn_optim.rule.falling_bound import (
    FREE_EPOCHS,
    LEAST_AT_ALL,
    LEAST_BOUND,
    MOST_WEIGHT,
    SHORTEST_ANNEALING,
    FallingBound,
    annealing_rate,
)
from gmn_optim.rule.layout import Layout, Segment, build_chunks

FULL = FallingBound(0.4, annealing=80.0, concentration=0.3, epochs=4.0)


def at(bound: FallingBound, age: int, cosine: float = -0.1, concentration: float = 0.0, share: float = 0.0) -> float:
    """Return the bound of a model of two matrices, one of which sees new rows alone."""
    memories = torch.zeros(2, 7).double()
    memories[:, 1], memories[:, 3], memories[0, 4] = cosine, concentration, share
    found = [bound.at(memories, ages, rate=1.0).unique().item() for ages in (age, torch.full((2,), age).double())]
    assert found[0] == pytest.approx(found[1], rel=1e-14)
    return found[0]


def test_it_does_not_fall_unless_it_is_told_to() -> None:
    assert not FallingBound(0.4).falls
    assert all(each.falls for each in (FallingBound(annealing=1.0), FallingBound(concentration=1.0), FULL))
    assert FallingBound(epochs=1.0).falls


@pytest.mark.parametrize("age", [1, 16, 40])
def test_new_data_are_as_without_epochs(age: int) -> None:
    without = FallingBound(0.4, annealing=80.0, concentration=0.3)
    for concentration in (0.0, 0.9):
        assert at(FULL, age, concentration=concentration) == at(without, age, concentration=concentration)
        assert at(without, age, concentration=concentration, share=0.3) == at(without, age, concentration=concentration)


@pytest.mark.parametrize(
    ("age", "share", "times"),
    [
        (40, 0.01, 0.5),  # four tenths of an epoch: annealing by steps is quicker
        (40, 0.2, 40 * 0.2 * 0.8 / 4),
        (16, 0.3, 16 * 0.3 * 0.7 / 4),
        (8, 0.5, 8 * 0.5 * 0.5 / 4),
        (40, 1.0, 0.5),  # a batch of all data has no noise
        (40, 2.0, 0.5),  # rows of a data set drawn with replacement, or twice in it
    ],
)
def test_epochs_hasten_annealing(age: int, share: float, times: float) -> None:
    assert at(FULL, age, share=share) == pytest.approx(0.4 - math.log1p(times))
    assert at(FallingBound(0.4, epochs=4.0), age, share=0.2) == pytest.approx(0.4 - math.log1p(age * 0.04))


def test_there_is_a_shortest_annealing() -> None:
    assert at(FallingBound(0.4, epochs=0.1), 30, share=0.5) == pytest.approx(0.4 - math.log1p(30 / SHORTEST_ANNEALING))


@pytest.mark.parametrize("cosine", [-0.1, 0.03, 0.2])
@pytest.mark.parametrize("epochs", [FREE_EPOCHS, FREE_EPOCHS + 1.5, FREE_EPOCHS + 6.0])
def test_what_is_seen_again_and_again_is_memorized_though_gradients_agree(cosine: float, epochs: float) -> None:
    bound, age = FallingBound(0.4, concentration=0.3, epochs=1e9), 100
    usual = at(bound, age, cosine, concentration=0.9)
    found = at(bound, age, cosine, concentration=0.9, share=epochs / age)
    assert usual - found == pytest.approx(0.3 * 0.4 * (epochs - FREE_EPOCHS), abs=1e-6)
    assert at(bound, age, cosine, concentration=0.5, share=1.0) == pytest.approx(0.4, abs=1e-7)


def test_it_has_least_values() -> None:
    assert at(FULL, 10**6) == LEAST_BOUND
    assert at(FULL, 10**6, concentration=9.0) == LEAST_BOUND
    assert at(FULL, 10**6, concentration=9.0, share=0.5) == LEAST_AT_ALL
    light = 0.3 * 0.1 * MOST_WEIGHT
    assert at(FULL, 10**6, concentration=0.6, share=0.5) == pytest.approx(LEAST_BOUND - light)


@pytest.mark.parametrize(
    ("widths", "rate"), [((3, 4, 2), 0.25), ((100, 200, 10), 1.0), ((9_000, 8, 2), 2.5), ((200, *(8,) * 8), 0.25)]
)
def test_the_largest_pace_falls_sooner_with_many_inputs_and_later_in_deep_models(widths: tuple, rate: float) -> None:
    shapes = list(zip(widths[1:], widths[:-1], strict=True))
    layers = [Segment(f"{n}.weight", shape, str(n), "weight") for n, shape in enumerate(shapes)]
    assert annealing_rate(Layout(tuple(build_chunks(layers, True))).matrices) == rate


def test_a_table_is_not_wide() -> None:
    table = Segment("0.weight", (5, 600), "0", "table")
    assert annealing_rate(Layout(tuple(build_chunks([table], True))).matrices) == 2.0
