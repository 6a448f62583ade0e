"""Rows that a layer sees again are told from new ones, and only where that tells how many data there are."""

import pytest
import torch
from torch import Tensor

from gmn_optim import GMNOptimizer
from gmn_optim.rule.controller import OF_TRAINING
from gmn_optim.rule.repeated_rows import KEPT_ROWS, fingerprints, follow_rows, softmax_of_labels


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Return a random tensor."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_has_its_number_wherever_it_stands(groups: int, dtype: torch.dtype) -> None:
    rows = draw(groups, 200, 37).to(dtype)
    numbers = fingerprints(rows)
    assert numbers.unique().numel() == 200
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    assert torch.equal(fingerprints(rows[:, order]), numbers[order])
    assert torch.equal(fingerprints(rows[:, order[:13]]), numbers[order[:13]])


@pytest.mark.parametrize("levels", [2, 256])
def test_rows_of_few_levels_have_numbers_of_their_own(levels: int) -> None:
    rows = torch.randint(0, levels, (1, 5_000, 64), generator=torch.Generator().manual_seed(0)).float() / 255
    # of twelve million pairs of rows next to none are taken for the same
    assert fingerprints(rows).unique().numel() >= 4_995


def test_a_row_of_zeros_has_none() -> None:
    assert fingerprints(torch.zeros(1, 3, 8)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_have_none(bad: float) -> None:
    assert fingerprints(torch.tensor([[[1.0, bad], [1.0, 2.0]]])).count_nonzero() == 1


def test_no_gradient_passes() -> None:
    assert not fingerprints(draw(1, 4, 3).requires_grad_()).requires_grad


def follow(*looks: Tensor) -> tuple[Tensor, list[float]]:
    """Return what is remembered after looks at the rows of one matrix (r, i), and how often one stood in each."""
    kept, found = torch.zeros(1, KEPT_ROWS), []
    for rows in looks:
        kept, times = follow_rows(kept, [fingerprints(rows.unsqueeze(0))])
        found.append(times.item())
    return kept[0], found


@pytest.mark.parametrize("rows", [5, 64, 90])
def test_the_rows_of_the_first_look_are_looked_for(rows: int) -> None:
    first, others = draw(rows, 6), draw(rows, 6, seed=1)
    known = min(rows, KEPT_ROWS)
    kept, times = follow(first, others, torch.cat([others, first[:4]]), first.repeat(2, 1))
    assert kept.count_nonzero() == known
    again = torch.isin(fingerprints(first[None, :4]).float(), kept).sum().item()
    assert times == pytest.approx([0.0, 0.0, again / known, 2.0]) and again > 0


def test_the_order_of_rows_is_immaterial() -> None:
    first, again = draw(90, 6), draw(90, 6, seed=1)
    again[:40] = first[50:]
    turned = [each[torch.randperm(90, generator=torch.Generator().manual_seed(2))] for each in (first, again)]
    (kept, times), (other, same) = follow(first, again), follow(*turned)
    assert torch.equal(kept, other) and times == same and times[1] > 0


def test_rows_that_stand_twice_in_the_first_look_tell_nothing() -> None:
    blank = torch.full((3, 6), 0.5)
    kept, times = follow(torch.cat([blank, draw(5, 6)]), blank)
    assert kept.count_nonzero() == 5 and times[1] == 0.0
    assert follow(blank, blank)[1] == [0.0, 0.0]


def test_until_something_is_known_a_later_look_is_the_first() -> None:
    rows = draw(5, 6)
    assert follow(torch.zeros(4, 6), rows, rows)[1] == [0.0, 0.0, 1.0]


def test_numbers_of_half_precision_tell_nothing() -> None:
    rows = draw(1, 5, 6).bfloat16()
    kept, times = follow_rows(torch.zeros(1, KEPT_ROWS, dtype=torch.bfloat16), [fingerprints(rows)])
    assert not kept.any() and not times.any()
    known = fingerprints(rows.repeat(1, 13, 1))[None, :KEPT_ROWS].bfloat16()
    assert not follow_rows(known, [fingerprints(rows)])[1].any()


def test_matrices_of_other_numbers_of_rows_are_followed_side_by_side() -> None:
    rows = [draw(1, 5, 6), draw(1, 80, 3, seed=1)]
    kept, _ = follow_rows(torch.zeros(2, KEPT_ROWS), [fingerprints(each) for each in rows])
    assert follow_rows(kept, [fingerprints(rows[0][:, :2]), fingerprints(rows[1])])[1].tolist() == pytest.approx(
        [2 / 5, 1.0]
    )


def test_a_few_rows_that_stand_once_tell_nothing() -> None:
    symbols = torch.eye(30)[torch.arange(64) % 12]
    rare = torch.cat([symbols[:60], torch.eye(30)[20:24]])
    kept, times = follow(rare, rare)
    assert kept.count_nonzero() == 4 and times[1] == 0.0


@pytest.mark.parametrize("shift", [1e3, 1e4])
def test_rows_differ_beside_a_large_feature_that_all_have(shift: float) -> None:
    rows = draw(1, 5_000, 16)
    rows[..., 3] += shift
    assert fingerprints(rows).float().unique().numel() > 4_900


def test_rows_that_lie_in_columns_have_the_same_numbers() -> None:
    rows = draw(300, 37)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    in_columns = rows.T.contiguous()[:, order].T
    assert not in_columns.is_contiguous()
    assert torch.equal(fingerprints(in_columns[None]), fingerprints(rows[None])[order])


def backprops_of(loss: str, outputs: int, rows: int = 40) -> Tensor:
    """Return backprops of a loss with respect to the last outputs (1, r, o)."""
    logits, generator = draw(rows, outputs).requires_grad_(), torch.Generator().manual_seed(1)
    labels = torch.randint(0, outputs, (rows,), generator=generator)
    if loss == "cross-entropy":
        torch.nn.functional.cross_entropy(logits, labels).backward()
    elif loss == "negative log-likelihood":
        torch.nn.functional.nll_loss(logits.log_softmax(-1), labels).backward()
    elif loss == "squares":
        torch.nn.functional.mse_loss(logits, draw(rows, outputs, seed=2)).backward()
    elif loss == "squares after normalization":  # such backprops sum to zero, too
        torch.nn.functional.mse_loss(
            torch.nn.functional.layer_norm(logits, (outputs,)), draw(rows, outputs, seed=2)
        ).backward()
    elif loss == "logistic":
        torch.nn.functional.binary_cross_entropy_with_logits(logits, labels[:, None].clamp_max(1).float()).backward()
    return logits.grad[None]


@pytest.mark.parametrize(
    ("loss", "outputs", "found"),
    [
        ("cross-entropy", 2, True),
        ("cross-entropy", 10, True),
        ("cross-entropy", 1_000, True),
        ("negative log-likelihood", 10, True),
        ("squares", 1, False),
        ("squares", 10, False),
        ("squares", 784, False),
        ("squares after normalization", 16, False),
        ("logistic", 1, False),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_a_softmax_with_labels_is_told_from_other_losses(loss: str, outputs: int, found: bool, scale: float) -> None:
    assert softmax_of_labels(scale * backprops_of(loss, outputs)).item() is found


def test_without_any_gradient_no_softmax_is_seen() -> None:
    assert not softmax_of_labels(torch.zeros(1, 4, 3))


LOSSES = {"labels": torch.nn.functional.cross_entropy, "squares": torch.nn.functional.mse_loss}


@pytest.mark.parametrize(
    ("number", "loss", "share"),
    [(40, "labels", 16 / 40), (80, "labels", 16 / 80), (100_000, "labels", 0.0), (40, "squares", 0.0)],
)
def test_an_optimizer_knows_how_large_the_data_set_of_a_classifier_is(number: int, loss: str, share: float) -> None:
    data, labels = draw(number, 6), torch.arange(number) % 3
    targets = labels if loss == "labels" else draw(number, 3, seed=3)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    optimizer, generator = GMNOptimizer(model), torch.Generator().manual_seed(2)
    for _ in range(400):
        places = torch.randint(number, (16,), generator=generator)
        optimizer.zero_grad()
        LOSSES[loss](model(data[places]), targets[places]).backward()
        optimizer.step()
    first, second = (optimizer.state[model[place].weight]["basis_memory"] for place in (0, 2))
    assert first[OF_TRAINING - 1].item() == pytest.approx(share, rel=0.35, abs=1e-9)
    assert second[OF_TRAINING - 1] == 0  # what it sees changes with the layer before it
