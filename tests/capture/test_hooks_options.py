"""The options of a capture: a budget of rows, a choice of layers, and what is refused."""

import pytest
import torch
from torch import nn

from gmn_optim.capture import GradientCapture
from gmn_optim.errors import InvalidArgumentError, ModelExpectedError, UnsupportedLayerError
from tests.cases import ReusedLayer


def mlp() -> nn.Sequential:
    """Return a small network."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def test_a_budget_keeps_evenly_spread_data_points_and_the_sum_in_expectation() -> None:
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(1, 3).expand(12, 3)
    with GradientCapture(model, rows=4) as capture:
        model(x).square().sum().backward()
    assert capture.gradients()["0"].activations.shape == (4, 1, 3)
    torch.testing.assert_close(capture.gradients().mean_gradient("0")["weight"], model[0].weight.grad)
    assert all(verdict.explained for verdict in capture.verify().values())


@pytest.mark.parametrize(("shape", "kept"), [((8, 3, 3), (2, 3, 3)), ((4, 20, 3), (2, 3, 3))])
def test_a_budget_keeps_some_data_points_and_their_positions_as_far_as_they_fit(
    shape: tuple[int, ...], kept: tuple[int, ...]
) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with GradientCapture(model, rows=7) as capture:
        model(torch.randn(shape)).square().sum().backward()
    assert capture.gradients()["0"].activations.shape == kept
    assert capture.verify()["0"].explained


def test_uses_share_a_budget_and_keep_the_same_data_points() -> None:
    model = ReusedLayer()
    with GradientCapture(model, rows=9) as capture:
        model(torch.randn(8, 5)).square().sum().backward()
    assert capture.gradients()["inner"].activations.shape == (3, 3, 5)


def test_capturing_leaves_the_global_generator_alone() -> None:
    model, x = mlp(), torch.randn(5, 3)
    state = torch.get_rng_state()
    with GradientCapture(model, rows=2) as capture:
        model(x).square().sum().backward()
        capture.verify()
    assert torch.equal(state, torch.get_rng_state())


def test_only_the_named_layers_are_captured() -> None:
    model = mlp()
    with GradientCapture(model, layers=["2"]) as capture:
        model(torch.randn(5, 3)).square().sum().backward()
    assert list(capture.gradients()) == ["2"] == list(capture.layers)


def test_layers_whose_weight_is_computed_are_passed_over() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 2))
    with GradientCapture(model) as capture:
        model(torch.randn(5, 3)).square().sum().backward()
    assert list(capture.gradients()) == ["1"]
    with pytest.raises(UnsupportedLayerError, match="not a plain real parameter"):
        GradientCapture(model, layers=["0"])


def test_no_data_points_are_no_error() -> None:
    model = mlp()
    with GradientCapture(model, rows=3) as capture:
        model(torch.randn(0, 3)).square().sum().backward()
    assert all(verdict.explained for verdict in capture.verify().values())


@pytest.mark.parametrize("given", [torch.ones(3), iter([torch.ones(3)]), [torch.ones(3)], None])
def test_anything_but_a_module_is_refused_with_the_fix(given: object) -> None:
    with pytest.raises(ModelExpectedError, match=r"GradientCapture\(model\)"):
        GradientCapture(given)


def test_arguments_are_checked() -> None:
    with pytest.raises(InvalidArgumentError, match="rows"):
        GradientCapture(mlp(), rows=0)
    with pytest.raises(InvalidArgumentError, match="nowhere"):
        GradientCapture(mlp(), layers=["nowhere"])
    with pytest.raises(InvalidArgumentError, match="one string"):
        GradientCapture(mlp(), layers="0")
    with pytest.raises(UnsupportedLayerError):
        GradientCapture(mlp(), layers=["1"])
