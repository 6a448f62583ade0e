"""Meta-learned scalars start where they should and move by relative amounts."""

import math

import pytest
import torch

from gmn_optim.rule.scalars import SPEED, Decay, LogScalar


@pytest.mark.parametrize("initial", [1e-8, 0.003, 0.1, 1.0, 50.0])
def test_a_log_scalar_starts_at_its_initial_value(initial: float) -> None:
    assert LogScalar(initial).double()().item() == initial


@pytest.mark.parametrize("raw", [-0.3, -0.01, 0.01, 0.3])
def test_a_log_scalar_is_initial_times_exp_of_ten_raw(raw: float) -> None:
    scalar = LogScalar(0.1).double()
    torch.nn.init.constant_(scalar.raw, raw)
    assert scalar().item() == pytest.approx(0.1 * math.exp(SPEED * raw), rel=1e-12)


@pytest.mark.parametrize("initial", [0.0, 0.5, 0.9, 0.999])
def test_a_decay_starts_at_its_initial_value(initial: float) -> None:
    assert Decay(initial).double()().item() == pytest.approx(initial, abs=1e-15)


@pytest.mark.parametrize("raw", [-0.3, -0.01, 0.01, 0.2])
def test_a_decays_distance_from_one_is_what_scales(raw: float) -> None:
    decay = Decay(0.9).double()
    torch.nn.init.constant_(decay.raw, raw)
    assert decay().item() == pytest.approx(1.0 - 0.1 * math.exp(SPEED * raw), abs=1e-12)


@pytest.mark.parametrize("raw", [-10.0, 0.5, 10.0, 50.0])
@pytest.mark.parametrize("initial", [0.0, 0.9])
def test_a_decay_stays_within_zero_and_one(initial: float, raw: float) -> None:
    decay = Decay(initial)
    torch.nn.init.constant_(decay.raw, raw)
    assert 0.0 <= decay().item() <= 1.0


def test_scalars_have_gradients_with_respect_to_what_is_stored() -> None:
    scalar, decay = LogScalar(0.1).double(), Decay(0.9).double()
    (scalar() + decay()).backward()
    assert scalar.raw.grad.item() == pytest.approx(SPEED * 0.1)
    assert decay.raw.grad.item() == pytest.approx(-SPEED * 0.1)
