"""Preconditioners of sides, against dense matrices."""

import pytest
import torch
from torch import Tensor

from gmn_optim.rule import sides
from gmn_optim.rule.preconditioner import (
    init_preconditioner,
    make_preconditioner,
    precondition,
    precondition_columns,
)

N, LEADING, FLOOR = 14, 3, 0.25


@pytest.fixture(autouse=True)
def _short_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sides of more than four entries be long ones."""
    for name, value in (("FULL_SIDE", 4), ("LEADING", LEADING), ("SKETCH", 5)):
        monkeypatch.setattr(sides, name, value)


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Return random numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def make_side(kind: str, groups: int) -> Tensor:
    """Return a basis: none, that of a short side, or that of a long one."""
    if kind == "none":
        return torch.empty(0).double()
    if kind == "full":
        return torch.linalg.qr(draw(groups, 4, 4))[0]
    return sides.leading_basis(draw(groups, N, 5))


def dense(side: Tensor, roots: Tensor) -> Tensor:
    """Return the preconditioner of one block (n, n): directions divided one at a time."""
    n, result = len(roots), torch.zeros(len(roots), len(roots)).double()
    if side.shape[-1] in (0, n):
        for k in range(n):
            direction = side[:, k] if side.numel() else torch.eye(n).double()[k]
            result += torch.outer(direction, direction) / (roots[k] + FLOOR)
        return result
    basis = sides.turn(side[None], torch.eye(n).double()[None])[0]
    places = side[:, -LEADING:].argmax(0).tolist()
    u, rest = basis[:, places], [k for k in range(n) if k not in places]
    entries = torch.stack([roots[k] if k in rest else roots[rest].mean() for k in range(n)])
    across = torch.eye(n).double() - u @ u.T
    for k, place in enumerate(places):
        result += torch.outer(u[:, k], u[:, k]) / (roots[place] + FLOOR)
    return result + across @ torch.diag(1 / (entries + FLOOR)) @ across


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ["none", "full", "long"])
def test_a_preconditioner_divides_every_direction_by_its_root(kind: str, groups: int) -> None:
    side = make_side(kind, groups)
    n = side.shape[-2] if side.numel() else 3
    roots, rows = draw(groups, n, seed=1).abs(), draw(groups, 6, n, seed=2)
    found = make_preconditioner(side, roots, torch.tensor(FLOOR).double())
    assert found.shape == init_preconditioner(side, groups, n).shape
    for group in range(groups):
        wanted = dense(side[group] if side.numel() else side, roots[group])
        torch.testing.assert_close(precondition(found, rows)[group], rows[group] @ wanted)
        torch.testing.assert_close(precondition_columns(found, rows.mT)[group], wanted @ rows[group].T)


@pytest.mark.parametrize("kind", ["none", "full", "long"])
def test_the_first_one_makes_no_step(kind: str) -> None:
    side = make_side(kind, 1)
    n = side.shape[-2] if side.numel() else 3
    first = init_preconditioner(side, 1, n)
    assert not precondition(first, draw(1, 6, n)).any() and not precondition_columns(first, draw(1, n, 6)).any()


def test_the_order_of_the_entries_of_a_long_side_does_not_matter() -> None:
    moment, roots, rows, order = draw(1, N, 5), draw(1, N, seed=1).abs(), draw(1, 6, N, seed=2), torch.randperm(N)
    # roots are of coordinates, which an eigenvector shares with the entry whose place it takes
    found = [
        precondition(make_preconditioner(sides.leading_basis(m), r, torch.tensor(FLOOR).double()), x)
        for m, r, x in ((moment, roots, rows), (moment[:, order], roots[:, order], rows[..., order]))
    ]
    torch.testing.assert_close(found[0][..., order], found[1])


def test_a_long_side_that_keeps_the_axes_divides_every_entry_by_its_own_root() -> None:
    side, roots = sides.init_side(1, N, draw(1))[0], draw(1, N, seed=1).abs()
    found = precondition(make_preconditioner(side, roots, torch.tensor(FLOOR).double()), torch.eye(N).double()[None])
    torch.testing.assert_close(found[0], torch.diag(1 / (roots[0] + FLOOR)))


def test_trainings_side_by_side_are_as_one_after_another() -> None:
    # a warning that an operation falls back to a loop over trainings would be an error
    moments, roots, rows = draw(3, 1, N, 5), draw(3, 1, N, seed=1).abs(), draw(3, 1, 6, N, seed=2)

    def run(moment: Tensor, root: Tensor, row: Tensor) -> Tensor:
        made = make_preconditioner(sides.leading_basis(moment), root, torch.tensor(FLOOR).double())
        return precondition(made, row) + precondition_columns(made, row.mT).mT

    found = torch.func.vmap(run)(moments, roots, rows)
    torch.testing.assert_close(found, torch.stack([run(*each) for each in zip(moments, roots, rows, strict=True)]))
