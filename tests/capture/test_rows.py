"""Few rows stand for all: no more than asked for, evenly spread, and the same whatever the order of the batch."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from gmn_optim.capture import GradientCapture
from gmn_optim.capture.rows import EVERY_ROW, RowChoice, choose_rows, rank_data_points
from gmn_optim.gradients import DecomposedGradient

pytestmark = pytest.mark.usefixtures("seeded")

SIZES = list(itertools.product((1, 2, 5, 12), (1, 3, 9), (1, 2, 6, 20, 200)))


def kept(choice: RowChoice, data_points: int, positions: int) -> tuple[list[int], list[int]]:
    """Return which data points and which positions are kept."""
    points = list(range(data_points)) if choice.points is None else choice.points.tolist()
    places = list(range(positions)) if choice.positions is None else choice.positions.tolist()
    return points, places


@pytest.mark.parametrize(("data_points", "positions", "rows"), SIZES)
def test_no_more_rows_are_kept_than_asked_for_and_no_fewer_than_half(
    data_points: int, positions: int, rows: int
) -> None:
    points, places = kept(choose_rows(data_points, positions, rows), data_points, positions)
    count = len(points) * len(places)
    assert count <= rows and 2 * count >= min(rows, data_points * positions)
    assert points == sorted(set(points)) and places == sorted(set(places))
    assert all(0 <= point < data_points for point in points) and all(0 <= place < positions for place in places)


@pytest.mark.parametrize(("data_points", "positions", "rows"), SIZES)
def test_backprops_are_scaled_by_how_many_rows_each_stands_for(data_points: int, positions: int, rows: int) -> None:
    choice = choose_rows(data_points, positions, rows)
    factor = torch.ones(data_points, positions, 2, dtype=torch.float64)
    thinned = choice.thin(DecomposedGradient(factor, factor))
    assert thinned.backprops.sum().item() == pytest.approx(factor.sum().item(), rel=1e-12)
    assert torch.equal(thinned.activations, torch.ones_like(thinned.activations))


@pytest.mark.parametrize(("data_points", "positions", "rows"), SIZES)
def test_kept_rows_are_evenly_spread(data_points: int, positions: int, rows: int) -> None:
    for chosen, count in zip(kept(choose_rows(data_points, positions, rows), data_points, positions),
                             (data_points, positions), strict=True):  # fmt: skip
        gaps = [b - a for a, b in itertools.pairwise(chosen)]
        assert not gaps or max(gaps) - min(gaps) <= 1
        assert abs((chosen[0] + chosen[-1]) / 2 - (count - 1) / 2) <= 0.5


def test_positions_are_thinned_before_most_data_points_are_left_out() -> None:
    points, places = kept(choose_rows(100, 100, 100), 100, 100)
    assert len(points) == 10 and len(places) == 10


@pytest.mark.parametrize("rows", [None, 12, 13])
def test_all_rows_are_kept_where_there_are_no_more(rows: int | None) -> None:
    assert choose_rows(4, 3, rows) is EVERY_ROW
    gradient = DecomposedGradient(torch.ones(4, 3, 2), torch.ones(4, 3, 5))
    assert EVERY_ROW.thin(gradient) is gradient and EVERY_ROW.of(gradient.backprops) is gradient.backprops


def test_an_order_of_rank_says_which_data_points_are_evenly_spaced() -> None:
    order = torch.tensor([5, 0, 4, 1, 3, 2])
    assert choose_rows(6, 1, 3, order).points.tolist() == [0, 1, 2] == order[[1, 3, 5]].tolist()


def test_data_points_are_ranked_by_the_norm_of_their_backprops_then_by_that_of_their_input() -> None:
    backprops, inputs = torch.randn(20, 3, 2), torch.randn(20, 3, 4)
    backprops[5:12] = 0.0
    norms = [(g.norm().item(), a.norm().item()) for g, a in zip(backprops, inputs, strict=True)]
    expected = sorted(range(20), key=norms.__getitem__)
    assert rank_data_points(backprops, inputs).tolist() == expected
    assert rank_data_points(backprops, torch.randn(7, 4)).tolist()[7:] == expected[7:]


def test_numbers_of_rows_rank_too() -> None:
    tokens = torch.tensor([[3, 1], [0, 1], [9, 9]])
    assert rank_data_points(torch.zeros(3, 2, 4), tokens).tolist() == [1, 0, 2]


@pytest.mark.parametrize("silent", [0, 9, 12])
def test_the_same_rows_are_kept_whatever_the_order_of_the_data_points(silent: int) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(12, 2, 3).double()
    weights = torch.ones(12, 1, 1, dtype=torch.float64)
    weights[:silent] = 0.0

    def captured(order: Tensor) -> dict[str, DecomposedGradient]:
        model.zero_grad()
        with GradientCapture(model, rows=8) as capture:
            (model(x[order]).square() * weights[order]).sum().backward()
        return capture.gradients()

    found, expected = captured(torch.randperm(12)), captured(torch.arange(12))
    for name, factors in expected.items():
        assert factors.backprops.shape[:2] == (4, 2)
        torch.testing.assert_close(found[name], factors, rtol=1e-12, atol=1e-14)


def test_all_layers_keep_rows_of_the_same_data_points() -> None:
    model, x = (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)),
        torch.randn(30, 3),
    )
    kept = []
    for rows in (None, 5):
        model.zero_grad()
        with GradientCapture(model, rows=rows) as capture:
            model(x).square().sum().backward()
        kept.append(capture.gradients())
    every, few = kept
    orders = {tuple(every[name].backprops.norm(dim=(1, 2)).argsort().tolist()) for name in every}
    chosen = {
        tuple((every[name].activations == row).all(2).nonzero()[0, 0].item() for row in few[name].activations)
        for name in every
    }
    assert len(orders) == 3 and len(chosen) == 1
