"""Arithmetic on the host is that of the rule on tensors."""

import math

import pytest
import torch

from gmn_optim.between_looks.pacing import AveragingWeights, Lengths, bound_of, follow_cosine, held_gains
from gmn_optim.rule.bounded_steps import bounded
from gmn_optim.rule.controller import Controller
from gmn_optim.rule.coordinates import Coordinates
from gmn_optim.rule.falling_bound import FallingBound
from gmn_optim.rule.layout import Layout, Segment, build_chunks
from gmn_optim.rule.schedule_free import _weights

SEGMENTS = [Segment(f"{n}.weight", (4, 3), f"{n}", "weight") for n in range(3)]
MATRICES = Layout(tuple(build_chunks(SEGMENTS, True))).matrices


def held(memory: torch.Tensor, age: int, body: Controller) -> list[torch.Tensor]:
    """Return the gains that the controller holds of matrices with these memories (n, 5), their cosines as they are."""
    zeros = torch.zeros(1, 4, 3, dtype=torch.float64)
    turned = [
        Coordinates(each, None, zeros, zeros, None, None, None, None, None, (), (), age=age)
        for each in MATRICES[: len(memory)]
    ]
    return [change.gain for change in body._changes(memory, turned, MATRICES)]


@pytest.mark.parametrize("age", [2, 11, 400])
@pytest.mark.parametrize(
    "setting",
    [
        (0.4, 80.0, 0.3),
        (0.4, 0.0, 0.3),
        (0.4, 80.0, 0.0),
        (0.8, 0.0, 0.0),
        (0.6, 80.0, 0.3, 4.0),
        (0.6, 0.0, 0.0, 4.0),
        (0.6, 0.0, 0.3, 0.5),
    ],
    ids=lambda each: f"{each}",
)
@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("first", [0.0, 0.03, -0.02])
def test_gains_are_those_of_the_controller(age: int, setting: tuple[float, ...], share: float, first: float) -> None:
    body = Controller(4, None, 0, share=share).double()
    body.first_pace.data.fill_(first)
    body.set_up(0.012, FallingBound(*setting))
    generator = torch.Generator().manual_seed(age)
    for _ in range(10):
        memory = torch.randn(3, 5, generator=generator).double()
        memory[:, 1] *= 0.1
        memory[:, 4] = memory[:, 4].abs() * 0.5
        expected = [gain.item() for gain in held(memory, age, body)]
        assert held_gains(body, memory.tolist(), age, MATRICES) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_without_matrices_there_are_no_gains() -> None:
    assert held_gains(Controller(4, None, 0), [], 3, MATRICES) == []


@pytest.mark.parametrize("step", [1.0, 2.0, 30.0, 5e3, 1e6])
@pytest.mark.parametrize(("beta", "sharpness"), [(0.8, 10.0), (0.98, 4.0), (0.0, 1.0)])
def test_weights_of_the_average_are_the_terms(step: float, beta: float, sharpness: float) -> None:
    expected = _weights(*(torch.tensor(value, dtype=torch.float64) for value in (step, beta, sharpness)))
    found = AveragingWeights.at(step, beta, sharpness)
    assert found == pytest.approx([value.item() for value in expected], rel=1e-12)


@pytest.mark.parametrize("size", [1e-30, 0.5, 1.5, 40.0])
def test_bounds_are_the_rules(size: float) -> None:
    step = torch.full((1, 4, 3), size, dtype=torch.float64)
    seen = step, step, None, None, None, None, None, (), ()
    (expected,) = bounded([Coordinates(MATRICES[0], None, *seen, is_turned=False)])
    assert bound_of(size) == pytest.approx(expected.bound.item(), rel=1e-12)


@pytest.mark.parametrize(("age", "weight"), [(2, 1.0), (3, 0.5), (6, 0.2), (1000, 0.2)])
def test_early_cosines_weigh_alike(age: int, weight: float) -> None:
    assert follow_cosine(0.5, Lengths(1.0, 2.0, 3.0, 1.0, 6.0), age) == pytest.approx(0.5 + weight * 0.5)


def test_a_cosine_that_is_no_number_is_forgotten() -> None:
    assert follow_cosine(math.nan, Lengths(1.0, 2.0, 3.0, 1.0, 6.0), 30) == 0.0
    assert Lengths(1.0, 0.0, 3.0, 1.0, 0.0).cosine == 0.0


@pytest.mark.parametrize(
    ("lengths", "ordinary"),
    [
        (Lengths(1.0, 1.0, 1.0, 1.0, 0.5), True),
        (Lengths(0.0, 0.0, 0.0, 0.0, 0.0), True),
        (Lengths(math.inf, 1.0, 1.0, 1.0, 0.5), False),
        (Lengths(1.0, 1.0, 1.0, 1.0, math.nan), False),
        (Lengths(1.0, 1e-20, 1.0, 1.0, 0.0), False),
        (Lengths(1.0, 1.0, 1e-20, 1.0, 0.0), False),
    ],
)
def test_what_is_ordinary(lengths: Lengths, ordinary: bool) -> None:
    assert lengths.is_ordinary is ordinary
