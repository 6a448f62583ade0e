"""Bounds of the steps that preconditioners make."""

import pytest
import torch

from gmn_optim.rule.basis import init_basis, preconditioned
from gmn_optim.rule.bounded_steps import LARGEST_SIZE, bounded, root_mean_squares
from gmn_optim.rule.coordinates import Coordinates
from gmn_optim.rule.layout import Layout, Segment, build_chunks
from gmn_optim.rule.nominal import LARGEST_ELEMENT

(MATRIX,) = Layout(tuple(build_chunks([Segment("0.weight", (4, 3), "0", "weight")], True))).matrices


def see(step: torch.Tensor, is_turned: bool = False) -> Coordinates:
    """Return a matrix with a step."""
    unknown = None, None, None, None, None
    return Coordinates(MATRIX, init_basis(MATRIX, step), step, step, *unknown, (), (), is_turned=is_turned)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1.6, 1e3, 1e30])
def test_a_step_is_as_large_as_it_is_or_as_allowed(size: float) -> None:
    step = size * torch.sign(torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0)))
    small, (each,) = 0.5 * torch.ones(1, 4, 3), bounded([see(step)])
    wanted = min(size, LARGEST_SIZE)
    assert each.step_size.item() == pytest.approx(wanted)
    torch.testing.assert_close(each.step * each.bound, step / size * wanted)
    assert bounded([see(step), see(small)])[1].bound == 1


@pytest.mark.parametrize("on_host", [False, True])
def test_where_squares_overflow_the_size_is_that_of_the_largest_element(on_host: bool) -> None:
    found = root_mean_squares([torch.tensor([1e30, -2e30]), torch.tensor([3.0, -3.0])], on_host)
    torch.testing.assert_close(found, torch.tensor([2e30, 3.0]))


def test_steps_that_no_preconditioner_made_are_not_bounded() -> None:
    step = torch.full((1, 4, 3), 9.0)
    one, other = bounded([see(step, is_turned=True), see(step)])
    assert one.bound is None and one.step_size is None and other.bound < 1


def test_a_column_that_was_nearly_constant_at_the_last_look_leaves_the_others_their_steps() -> None:
    gradient = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0))
    sides = torch.eye(4).unsqueeze(0), torch.diag(torch.tensor([1.0, 1e4, 1.0])).unsqueeze(0)
    basis = init_basis(MATRIX, gradient, preconditions=True)
    basis = basis._replace(row_preconditioner=sides[0], column_preconditioner=sides[1])
    (free,), (held,) = (bounded([see(preconditioned(basis, gradient, largest))]) for largest in (0.0, LARGEST_ELEMENT))
    torch.testing.assert_close(held.step[..., [0, 2]], gradient[..., [0, 2]])
    torch.testing.assert_close(held.step[..., 1], LARGEST_ELEMENT * gradient[..., 1].sign())
    others = [(each.step * each.bound)[..., [0, 2]].norm() / gradient[..., [0, 2]].norm() for each in (free, held)]
    assert others[0] < 0.001 and others[1] > 0.4


def test_what_is_not_a_number_is_not_made_one() -> None:
    basis = init_basis(MATRIX, torch.zeros(()), preconditions=True)._replace(row_preconditioner=torch.eye(4)[None])
    assert preconditioned(basis, torch.full((1, 4, 3), torch.nan), LARGEST_ELEMENT).isnan().all()
