"""Features say nothing about the scale of a problem, and never divide by zero."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from gmn_optim.rule import Chunk, Segment, layout
from gmn_optim.rule.features import (
    DECAYS,
    TIME_SCALES,
    channel_scales,
    parameter_features,
    time_features,
    update_averages,
)
from tests import reference

CHUNK = Chunk((Segment("w", (2, 3)), Segment("b", (2,)), Segment("s", ())), learned=True)


def channels(scale: float = 1.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Return a parameter-like channel that is not scaled, a gradient and its averages that are."""
    generator = torch.Generator().manual_seed(0)
    parameter = torch.randn(CHUNK.size, generator=generator, dtype=dtype)
    gradient = scale * torch.randn(CHUNK.size, generator=generator, dtype=dtype)
    return parameter, gradient, scale * torch.randn(CHUNK.size, 6, generator=generator, dtype=dtype)


class Normalized(NamedTuple):
    """Channels divided by their scales, and the scales."""

    features: Tensor
    scales: Tensor


def normalize(given: tuple[Tensor, ...]) -> Normalized:
    """Return the features of all elements of the chunk."""
    (tile,), scales = CHUNK.tiles(), channel_scales(CHUNK, given)
    return Normalized(parameter_features(CHUNK, given, scales, tile), scales)


def test_each_channel_has_root_mean_square_one_over_each_tensor() -> None:
    normalized = normalize(channels())
    assert normalized.features.shape == (9, 8) and normalized.scales.shape == (3, 8)
    for piece in normalized.features.split([6, 2, 1]):
        for channel in piece.T.tolist():
            assert reference.root_mean_square(channel) == pytest.approx(1.0, rel=1e-12)


def test_scales_are_the_root_mean_squares_that_were_divided_out() -> None:
    normalized, stacked = normalize(channels()), torch.cat([c.view(9, -1) for c in channels()], dim=1)
    for number, piece in enumerate(stacked.split([6, 2, 1])):
        expected = [reference.root_mean_square(channel) for channel in piece.T.tolist()]
        assert normalized.scales[number].tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("limit", [1, 5, 7])
def test_tiles_of_one_tensor_have_its_features_and_scales(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    chunk = Chunk((Segment("w", (3, 3), "0", "weight"),), learned=True)
    (whole,), scales = chunk.tiles(), channel_scales(chunk, channels())
    features = parameter_features(chunk, channels(), scales, whole)
    monkeypatch.setattr(layout, "TILE_SIZE", limit)
    assert len(chunk.tiles()) > 1
    torch.testing.assert_close(channel_scales(chunk, channels()), scales, rtol=1e-12, atol=0)
    tiles = torch.cat([parameter_features(chunk, channels(), scales, tile) for tile in chunk.tiles()])
    assert torch.equal(tiles, features)


@pytest.mark.parametrize("scale", [1e-6, 1e6, 1e-12])
def test_scaled_gradients_have_the_same_features(scale: float) -> None:
    found, expected = (normalize(channels(s)).features for s in (scale, 1.0))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scaled_gradients_have_the_same_features_in_float32(scale: float) -> None:
    found, expected = (normalize(channels(s, torch.float32)).features for s in (scale, 1.0))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_tensors_have_zero_features(dtype: torch.dtype) -> None:
    normalized = normalize(tuple(map(torch.zeros_like, channels(dtype=dtype))))
    assert not normalized.features.any() and not normalized.scales.any()


def test_one_zero_tensor_leaves_the_others_alone() -> None:
    given = channels()
    expected = normalize(given)
    for channel in given:
        channel[6:8] = 0.0
    found = normalize(given)
    assert not found.features[6:8].any()
    assert torch.equal(found.features[:6], expected.features[:6]) and torch.equal(
        found.features[8:], expected.features[8:]
    )


@pytest.mark.parametrize("tiny", [1e-30, 1e-20, 5e-324])
def test_gradients_that_underflow_give_no_nan(tiny: float) -> None:
    assert normalize(channels(tiny)).features.isfinite().all()


def test_averages_are_those_of_a_scalar_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    averages = torch.zeros(4, len(DECAYS), dtype=torch.float64)
    for row in values:
        averages = update_averages(averages, row)
    for element in range(4):
        expected = [reference.moving_average(values[:, element].tolist(), decay) for decay in DECAYS]
        assert averages[element].tolist() == pytest.approx(expected, rel=1e-12)


def test_averages_of_other_shapes_are_the_same() -> None:
    values = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0))
    found = update_averages(torch.ones(3, 2, 5, 6), values)
    assert torch.equal(found.view(30, 6), update_averages(torch.ones(30, 6), values.view(30)))


@pytest.mark.parametrize("step", [1, 2, 100, 100_000, 10**9])
def test_time_features_are_those_of_the_formula(step: int) -> None:
    found = time_features(torch.tensor(float(step), dtype=torch.float64)).tolist()
    assert found == pytest.approx([math.tanh(step / scale - 1.0) for scale in TIME_SCALES], abs=1e-12)
    assert all(-1.0 <= value <= 1.0 for value in found)


def test_constants_keep_the_dtype_of_each_caller() -> None:
    for dtype in (torch.float32, torch.float64, torch.float32):
        assert time_features(torch.ones((), dtype=dtype)).dtype == dtype
        assert update_averages(torch.zeros(2, 6, dtype=dtype), torch.ones(2, dtype=dtype)).dtype == dtype
