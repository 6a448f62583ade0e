"""Long sides: their bases are orthogonal, hold the leading eigenvectors, and ask nothing of signs or order."""

import copy

import pytest
import torch
from torch import Tensor, nn

from gmn_optim import GMNOptimizer
from gmn_optim.rule import sides
from gmn_optim.rule.sides import (
    follow_moment,
    init_side,
    leading_basis,
    second_moment,
    turn,
    turn_back,
    turn_columns,
    turn_columns_back,
    turn_squares,
)
from tests import reference
from tests.cases import assert_same, distance, loss_of, optimizer_for, train

N, LEADING, SKETCH = 13, 3, 5


@pytest.fixture(autouse=True)
def _short_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sides of more than four entries have three leading eigenvectors."""
    for name, value in (("FULL_SIDE", 4), ("LEADING", LEADING), ("SKETCH", SKETCH), ("SKETCH_ROWS", 8)):
        monkeypatch.setattr(sides, name, value)


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Return a random tensor in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def make_root(seed: int = 0) -> Tensor:
    """Return the root of a second moment as a look leaves it: orthogonal columns, the longest first (1, n, m)."""
    u, sizes, _ = torch.linalg.svd(draw(N, SKETCH, seed=seed), full_matrices=False)
    return (u * sizes)[None]


def whole(side: Tensor) -> Tensor:
    """Return a basis as a matrix (n, n)."""
    return turn(side, torch.eye(N).double()[None])[0]


def test_the_basis_is_orthogonal_and_holds_the_leading_eigenvectors() -> None:
    basis, root = whole(leading_basis(make_root())), make_root()[0]
    torch.testing.assert_close(basis.mT @ basis, torch.eye(N).double())
    vectors = torch.linalg.eigh(root @ root.mT)[1].flip(-1)[:, :LEADING]
    cosines = (vectors.mT @ basis).abs()
    assert cosines.amax(-1).tolist() == pytest.approx([1.0] * LEADING)
    assert len(set(cosines.argmax(-1).tolist())) == LEADING


def test_other_directions_are_near_the_axes() -> None:
    root = torch.zeros(1, N, SKETCH).double()
    root[0, [2, 7, 9], [0, 1, 2]] = torch.tensor([3.0, 2.0, 1.0]).double()
    basis, others = whole(leading_basis(root)).abs(), [n for n in range(N) if n not in (2, 7, 9)]
    torch.testing.assert_close(basis[:, others], torch.eye(N).double()[:, others])
    assert basis[[2, 7, 9]][:, [2, 7, 9]].sum(0).tolist() == pytest.approx([1.0] * 3)  # ties of the three are no order


def test_signs_of_eigenvectors_are_immaterial() -> None:
    root, signs = make_root(), torch.tensor([1.0, -1, -1, 1, 1]).double()
    one, other = whole(leading_basis(root)), whole(leading_basis(root * signs))
    torch.testing.assert_close(one.abs(), other.abs())


def test_the_order_of_entries_is_immaterial() -> None:
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    one, other = whole(leading_basis(make_root())), whole(leading_basis(make_root()[:, order]))
    torch.testing.assert_close(other.abs(), one[order][:, order].abs())


def test_turning_rows_and_columns_is_a_product_with_the_basis() -> None:
    side, values = leading_basis(make_root()), draw(1, 4, N, seed=3)
    basis = whole(side)
    torch.testing.assert_close(turn(side, values), values @ basis)
    torch.testing.assert_close(turn_columns(side, values.mT), basis.mT @ values.mT)
    torch.testing.assert_close(turn_back(side, turn(side, values)), values)
    torch.testing.assert_close(turn_columns_back(side, turn_columns(side, values.mT)), values.mT)


@pytest.mark.parametrize("from_axes", [False, True])
def test_squares_of_leading_directions_are_those_of_loops_and_sums_stay(from_axes: bool) -> None:
    old = init_side(1, N, draw(1))[0] if from_axes else leading_basis(make_root(1))
    new, squares = leading_basis(make_root(2)), draw(1, 4, N, seed=3).square()
    found = turn_squares(new, old, squares)[0]
    places = new[0, :, -LEADING:].argmax(0).tolist()
    wanted = reference.turned_squares(whole(old), whole(new)[:, places], squares[0])
    torch.testing.assert_close(found[:, places], torch.tensor(wanted).double())
    torch.testing.assert_close(found.sum(-1), squares[0].sum(-1))
    assert found.min() >= 0


def test_the_moving_average_is_that_of_whole_matrices_while_its_rank_allows() -> None:
    average, matrix = init_side(1, N, draw(1))[1], torch.zeros(N, N).double()
    for step in range(2):
        rows = draw(1, 2, N, seed=step)
        average = follow_moment(average, second_moment(rows), 0.9)
        gram = rows[0].mT @ rows[0]
        matrix = 0.9 * matrix + 0.1 * gram / gram.diagonal().mean()
    torch.testing.assert_close((average @ average.mT)[0], matrix)
    torch.testing.assert_close(average.mT @ average, torch.diag_embed(average.square().sum(-2)))


def test_many_looks_find_the_leading_directions() -> None:
    average, spread = init_side(1, N, draw(1))[1], torch.tensor([9.0, 6, 4, *[0.5] * (N - 3)]).double()
    turned = torch.linalg.qr(draw(N, N, seed=7))[0]
    for step in range(60):
        average = follow_moment(average, second_moment((draw(1, 20, N, seed=step) * spread) @ turned.mT), 0.95)
    basis = whole(leading_basis(average))
    assert (turned[:, :3].mT @ basis).abs().amax(-1).min() > 0.98


def test_a_look_that_counts_for_nothing_or_is_not_finite_changes_nothing() -> None:
    average, moment = make_root(), second_moment(draw(1, 3, N))
    assert torch.equal(follow_moment(average, moment, torch.tensor(1.0).double()), average)
    assert torch.equal(follow_moment(average, moment * torch.nan, 0.9), average)


def test_rows_beyond_the_budget_are_chosen_whatever_their_order() -> None:
    rows = draw(1, 30, N)
    one, other = (second_moment(each) for each in (rows, rows.flip(1)))
    assert one.shape == (1, N, 8)
    torch.testing.assert_close(one @ one.mT, other @ other.mT)


@pytest.mark.parametrize("scale", [0.0, 1e-25, 1e25])
def test_rows_of_any_size_leave_a_basis_orthonormal(scale: float) -> None:
    average = follow_moment(init_side(1, N, torch.zeros(()))[1], second_moment(scale * torch.ones(1, 2, N)), 0.95)
    basis = turn(leading_basis(average), torch.eye(N)[None])[0]
    torch.testing.assert_close(basis @ basis.mT, torch.eye(N), rtol=0, atol=1e-5)


def wide() -> nn.Sequential:
    """Return a network all of whose sides but the last are long."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 2)).double()


def permuted(model: nn.Sequential, order: Tensor) -> nn.Sequential:
    """Return a copy with its first hidden layer permuted."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.copy_(model[0].weight[order])
        other[0].bias.copy_(model[0].bias[order])
        other[2].weight.copy_(model[2].weight[:, order])
    return other


ARMS = ["eigenbasis", "controller"]


@pytest.mark.parametrize("arm", ARMS)
def test_a_wide_network_trains_the_same_under_any_order_of_its_neurons(arm: str) -> None:
    model, order = wide(), torch.randperm(8, generator=torch.Generator().manual_seed(1))
    start, twin = copy.deepcopy(model), permuted(model, order)
    batches = [draw(16, 9, seed=number) for number in range(14)]
    for each in (model, twin):
        train(each, optimizer_for(each, arm), batches)
    assert distance(model, start) > 0.01
    assert_same(twin, permuted(model, order), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("arm", ARMS)
def test_a_saved_state_goes_on_as_if_never_stopped(arm: str) -> None:
    model, batches = wide(), [draw(16, 9, seed=number) for number in range(14)]
    twin = copy.deepcopy(model)
    train(model, optimizer_for(model, arm), batches)
    first = optimizer_for(twin, arm)
    train(twin, first, batches[:8])
    second = optimizer_for(twin, arm)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    first.close()
    train(twin, second, batches[8:])
    assert_same(model, twin)


def test_where_no_factors_explain_gradients_a_wide_network_trains_too() -> None:
    model, inputs = wide(), draw(16, 9)
    before = loss_of(model, inputs).item()
    optimizer = GMNOptimizer(model, weights=None, nominal="kronecker_schedule_free")
    optimizer.close()  # no hooks, no factors: bases come from gradients
    train(model, optimizer, [inputs] * 30)
    assert loss_of(model, inputs).item() < 0.7 * before
