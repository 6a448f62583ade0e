"""Examples are parted without overlap, and variations change what they say."""

import pytest
import torch
from torch import nn

from gmn_optim.tasks.supervised import Examples, SupervisedTask, Variation, redraw_labels, split_examples, standardize


def numbered(start: int, stop: int) -> Examples:
    """Return examples whose input is their number, in three classes."""
    numbers = torch.arange(start, stop)
    return Examples(numbers.float().unsqueeze(1), numbers % 3)


def make_task(**options: object) -> SupervisedTask:
    """Return a small classifier."""
    return SupervisedTask(nn.Linear(1, 3), split_examples(numbered(0, 80), numbered(80, 100)), **options)


def test_parts_do_not_overlap() -> None:
    task = make_task(batch_size=2_000)
    drawn = task.sample_batch(torch.Generator().manual_seed(0))[0]
    assert set(drawn.flatten().tolist()) == set(range(70))
    assert task.held_out("validation")[0].flatten().tolist() == list(range(70, 80))
    assert task.held_out("test")[0].flatten().tolist() == list(range(80, 100))


def test_scales_multiply_inputs_and_parameters() -> None:
    plain, varied = make_task(), make_task(variation=Variation(parameter_scale=2.0, input_scale=0.5))
    draws = [(task.init_parameters(g), task.sample_batch(g)) for task in (plain, varied) if (g := torch.Generator())]
    torch.testing.assert_close(draws[1][0]["weight"], 2 * draws[0][0]["weight"])
    torch.testing.assert_close(draws[1][1][0], 0.5 * draws[0][1][0])
    assert torch.equal(draws[1][1][1], draws[0][1][1])


def test_noise_is_in_training_labels_only() -> None:
    task = make_task(batch_size=500, variation=Variation(label_noise=0.5))
    inputs, labels = task.sample_batch(torch.Generator().manual_seed(0))
    assert 0.2 < (labels != inputs.flatten().long() % 3).float().mean() < 0.5
    for split in ("validation", "test"):
        inputs, labels = task.held_out(split)
        assert torch.equal(labels, inputs.flatten().long() % 3)


def test_the_same_labels_are_noisy_each_time() -> None:
    labels = torch.zeros(1_000, dtype=torch.int64)
    assert torch.equal(redraw_labels(labels, 4, 0.2), redraw_labels(labels, 4, 0.2))
    assert (redraw_labels(labels, 4, 0.2) != 0).float().mean().item() == pytest.approx(0.15, abs=0.04)


def test_squares_are_the_loss_of_other_targets() -> None:
    rows = Examples(torch.randn(16, 2), torch.randn(16, 3))
    task = SupervisedTask(nn.Linear(2, 3), split_examples(rows, rows))
    parameters = {"weight": torch.zeros(3, 2), "bias": torch.ones(3)}
    batch = task.held_out("test")
    torch.testing.assert_close(task.loss(parameters, batch), (rows.targets - 1).square().mean())
    assert task.loss_floor == 1e-3


def test_columns_are_standardized_one_by_one() -> None:
    values = torch.tensor([[0, 7, 10], [2, 7, 30]], dtype=torch.uint8)
    scaled = standardize(values, by_column=True).apply(values)
    assert scaled.isfinite().all() and torch.equal(scaled[:, 1], torch.zeros(2))
    torch.testing.assert_close(scaled[:, 0], scaled[:, 2])
