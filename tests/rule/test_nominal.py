"""Nominal terms are the optimizers of the textbook, step by step."""

import pytest
import torch
from torch import Tensor, nn

from gmn_optim.rule.nominal import AbstractNominalTerm, nominal_terms
from tests import reference
from tests.tables import NOMINAL_TERMS

GRADIENTS = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def run(term: AbstractNominalTerm, gradients: Tensor, momentum: float | None = None) -> list[Tensor]:
    """Return the direction of every step."""
    buffers = tuple(torch.zeros_like(gradients[0]) for _ in range(term.buffers_per_parameter))
    override = None if momentum is None else torch.tensor(momentum, dtype=gradients.dtype)
    directions = []
    for number, gradient in enumerate(gradients):
        step = torch.tensor(float(number + 1), dtype=gradients.dtype)
        direction, buffers = term.direction(gradient, buffers, step, override)
        assert len(buffers) == term.buffers_per_parameter
        directions.append(direction)
    return directions


def make(name: str) -> AbstractNominalTerm:
    """Return a nominal term in float64, not to be trained."""
    return nominal_terms[name]().double().requires_grad_(False)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5}], ids=["its own momentum", "a given momentum"])
@pytest.mark.parametrize("name", NOMINAL_TERMS)
def test_a_nominal_term_equals_torchs_optimizer_step_by_step(name: str, options: dict[str, float]) -> None:
    parameter = nn.Parameter(torch.ones(5, dtype=torch.float64))
    expected, optimizer = torch.ones(5, dtype=torch.float64), NOMINAL_TERMS[name]([parameter], 0.05, **options)
    for gradient, direction in zip(GRADIENTS, run(make(name), GRADIENTS, **options), strict=True):
        parameter.grad = gradient.clone()
        optimizer.step()
        expected = expected - 0.05 * direction
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-9, atol=1e-12)


def test_momentum_is_the_average_of_a_scalar_loop() -> None:
    found = run(make("momentum"), GRADIENTS)[-1]
    expected = [reference.moving_average(GRADIENTS[:, k].tolist(), 0.9) for k in range(5)]
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 12])
def test_adam_is_the_direction_of_a_scalar_loop(steps: int) -> None:
    found = run(make("adam"), GRADIENTS[:steps])[-1]
    expected = [reference.adam_direction(GRADIENTS[:steps, k].tolist()) for k in range(5)]
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", NOMINAL_TERMS)
def test_elements_do_not_see_one_another(name: str) -> None:
    together, alone = run(make(name), GRADIENTS)[-1], run(make(name), GRADIENTS[:, :2])[-1]
    assert torch.equal(together[:2], alone)


@pytest.mark.parametrize("name", NOMINAL_TERMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_gradients_give_a_zero_direction(name: str, dtype: torch.dtype) -> None:
    term = nominal_terms[name]().to(dtype)
    assert not any(direction.any() for direction in run(term, torch.zeros(3, 4, dtype=dtype)))
