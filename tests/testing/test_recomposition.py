"""assert_recomposes fails a wrong adapter with the parameter and the size, and refuses to test nothing."""

import re

import pytest
import torch
from torch import Tensor, nn

from gmn_optim.capture.adapters import register_layer
from gmn_optim.capture.linear import LinearAdapter
from gmn_optim.gradients import DecomposedGradient
from gmn_optim.testing import assert_recomposes


class Layer(nn.Linear):
    """A linear layer of a kind of its own."""


class TwiceTheInput(LinearAdapter):
    """Wrong: activations."""

    def activations(self, module: nn.Module, layer_input: Tensor) -> Tensor:
        """Return twice the input."""
        return super().activations(module, 2 * layer_input)


class MinusTheSignal(LinearAdapter):
    """Wrong: backprops."""

    def backprops(self, module: nn.Module, output_gradient: Tensor) -> Tensor:
        """Return the signal with the other sign."""
        return -super().backprops(module, output_gradient)


class MeanBias(LinearAdapter):
    """Wrong: the bias's gradient."""

    def recompose(self, module: nn.Module, gradient: DecomposedGradient) -> dict[str, Tensor]:
        """Return the mean where the sum is right."""
        return {**super().recompose(module, gradient), "bias": gradient.backprops.mean((0, 1))}


class NoBias(LinearAdapter):
    """Wrong: forgets the bias."""

    def recompose(self, module: nn.Module, gradient: DecomposedGradient) -> dict[str, Tensor]:
        """Return the weight's gradient alone."""
        return {"weight": gradient.sum_of_outer_products()}


class OtherShape(LinearAdapter):
    """Wrong: the weight's gradient lies otherwise."""

    def recompose(self, module: nn.Module, gradient: DecomposedGradient) -> dict[str, Tensor]:
        """Return the gradient transposed."""
        return {**super().recompose(module, gradient), "weight": gradient.sum_of_outer_products().mT}


class MixedDataPoints(LinearAdapter):
    """Wrong for each data point: rows of different data points change places, together in both factors."""

    def activations(self, module: nn.Module, layer_input: Tensor) -> Tensor:
        """Return the data points one further."""
        return super().activations(module, layer_input).roll(1, 0)

    def backprops(self, module: nn.Module, output_gradient: Tensor) -> Tensor:
        """Return the data points one further."""
        return super().backprops(module, output_gradient).roll(1, 0)


class PositionsAsDataPoints(LinearAdapter):
    """Wrong for each data point: positions on the axis of data points."""

    def activations(self, module: nn.Module, layer_input: Tensor) -> Tensor:
        """Return all rows as data points."""
        return layer_input.flatten(0, -2).unsqueeze(1)

    def backprops(self, module: nn.Module, output_gradient: Tensor) -> Tensor:
        """Return all rows as data points."""
        return output_gradient.flatten(0, -2).unsqueeze(1)


FAULTS = {
    TwiceTheInput: r"weight: recomposed gradient is off by 1.0e\+00 of .*, tolerance 1e-09 \(sum loss\)",
    MinusTheSignal: r"weight: sum of g a\^T is off by 2.0e\+00.*bias: recomposed gradient is off.*\(mean loss\)",
    MeanBias: "bias: recomposed gradient is off",
    NoBias: "bias: recomposed gradient is missing",
    OtherShape: r"weight: recomposed gradient has shape \(3, 2\), expected \(2, 3\)",
    MixedDataPoints: "weight: per-sample gradient is off",
    PositionsAsDataPoints: r"weight: per-sample gradient has shape \(20, 2, 3\), expected \(5, 2, 3\)",
}


@pytest.mark.parametrize("adapter", FAULTS)
def test_a_wrong_adapter_fails_with_the_parameter_and_the_size(
    own_registry: None, adapter: type[LinearAdapter]
) -> None:
    register_layer(Layer)(adapter)
    torch.manual_seed(0)
    layer, x = Layer(3, 2).double(), torch.randn(5, 4, 3, dtype=torch.float64)
    with pytest.raises(AssertionError, match=FAULTS[adapter]):
        assert_recomposes(layer, x)


def test_a_wrong_layer_inside_a_model_is_named_with_its_path(own_registry: None) -> None:
    register_layer(Layer)(MeanBias)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Sequential(Layer(4, 2))).double()
    with pytest.raises(AssertionError, match=r"^2.0.bias: (?!.*(weight|0\.bias: .*1\.bias))"):
        assert_recomposes(model, torch.randn(5, 3, dtype=torch.float64))


class Tied(nn.Module):
    """Layers with one weight, a layer that is used twice, and one that no adapter serves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(3, 3), nn.Linear(3, 3), nn.LayerNorm(3)
        self.second.weight = self.first.weight
        self.reused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs like x."""
        x = self.norm(self.second(self.first(x).tanh()))
        return self.reused(self.reused(x).tanh())


class TwoInputs(nn.Module):
    """A module of two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the sum of both maps."""
        return self.left(x) + self.right(y)


RECOMPOSED = {
    "tied": (Tied, [(5, 3)]),
    "tied with positions": (Tied, [(5, 2, 3)]),
    "two inputs": (TwoInputs, [(5, 3), (5, 4)]),
    "dropout, which does not map": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2)), [(5, 3)]),
    "running statistics": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), [(5, 3)]),
    "no axis of data points": (lambda: nn.Linear(3, 2), [(3,)]),
}


@pytest.mark.parametrize("name", RECOMPOSED)
def test_models_of_served_layers_pass_and_stay_as_they_are(name: str) -> None:
    torch.manual_seed(0)
    make, shapes = RECOMPOSED[name]
    model = make().double()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert_recomposes(model, tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_float32_passes_with_its_tolerance() -> None:
    torch.manual_seed(0)
    assert_recomposes(nn.Linear(30, 20), torch.randn(50, 30))


NOTHING = {
    "no served layer": (nn.PReLU(), torch.ones(5, 3), "no adapter serves a parameter of this PReLU"),
    "frozen": (nn.Linear(3, 2).requires_grad_(False), torch.ones(5, 3), "no adapter serves"),
    "zero input": (nn.Linear(3, 2), torch.zeros(5, 3), "weight: nothing is tested, its gradient is zero"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_where_there_is_no_gradient_nothing_is_tested(name: str) -> None:
    module, x, reason = NOTHING[name]
    with pytest.raises(AssertionError, match=re.escape(reason)):
        assert_recomposes(module, x)


def test_the_global_random_state_stays_as_it_is() -> None:
    layer, before = nn.Sequential(nn.Linear(3, 2), nn.Dropout()), torch.get_rng_state()
    assert_recomposes(layer, torch.ones(5, 3))
    assert torch.equal(torch.get_rng_state(), before)
