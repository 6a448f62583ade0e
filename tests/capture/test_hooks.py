"""Captured factors are exactly the gradients that autograd computes, however the model is used."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from gmn_optim.capture import GradientCapture

# Claims of exactness are made in float64.
pytestmark = pytest.mark.usefixtures("double_precision", "seeded")


def mlp(bias: bool = True, inplace: bool = False) -> nn.Sequential:
    """Return a small network."""
    return nn.Sequential(
        nn.Linear(3, 4, bias=bias), nn.ReLU(inplace=inplace), nn.Linear(4, 4, bias=bias), nn.Tanh(), nn.Linear(4, 2)
    )


def assert_explains(capture: GradientCapture, model: nn.Module, missing: tuple[str, ...] = ()) -> None:
    """Compare every trainable parameter's ``.grad`` with the recomposed factors."""
    gradients = capture.gradients()
    for name, parameter in model.named_parameters():
        layer, _, slot = name.rpartition(".")
        if parameter.requires_grad and name not in missing:
            torch.testing.assert_close(gradients.mean_gradient(layer)[slot], parameter.grad, rtol=1e-9, atol=1e-12)
    verdicts = capture.verify()
    assert all(verdict.explained for verdict in verdicts.values()), verdicts


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3,), (5, 3), (5, 2, 3), (5, 2, 2, 3)])
def test_sum_of_outer_products_is_the_gradient(shape: tuple[int, ...], bias: bool, reduction: str) -> None:
    model = mlp(bias)
    with GradientCapture(model) as capture:
        getattr(model(torch.randn(shape)).square(), reduction)().backward()
    assert_explains(capture, model)
    assert [verdict.scale for verdict in capture.verify().values()] == pytest.approx([1.0] * 3)


@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 3)])
def test_each_data_point_has_the_gradient_that_vmap_gives(shape: tuple[int, ...]) -> None:
    model, x = mlp(), torch.randn(shape)
    with GradientCapture(model) as capture:
        model(x).square().sum().backward()

    def loss(parameters: dict[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(model, parameters, (one,)).square().sum()

    expected = vmap(grad(loss), (None, 0))(dict(model.named_parameters()), x)
    for name, value in expected.items():
        layer, slot = name.split(".")
        found = capture.gradients().per_sample_gradients(layer)[slot]
        torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-12)


class Reused(nn.Module):
    """One layer used several times in one forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.layer(x).tanh()
        return x


def test_a_reused_layer_has_one_position_per_use() -> None:
    model = Reused()
    with GradientCapture(model) as capture:
        model(torch.randn(5, 3)).square().sum().backward()
    assert capture.gradients()["layer"].activations.shape == (5, 3, 3)
    assert_explains(capture, model)


def test_tied_weights_are_summed_under_the_first_name() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    with GradientCapture(model) as capture:
        model(torch.randn(5, 3)).square().sum().backward()
    gradients = capture.gradients()
    assert list(gradients) == ["0"] and gradients["0"].backprops.shape == (5, 2, 3)
    assert list(gradients.mean_gradient("0")) == ["weight"]
    torch.testing.assert_close(gradients.mean_gradient("0")["weight"], model[0].weight.grad)
    assert capture.layer_of(model[2].weight) == "0" and capture.layer_of(model[2].bias) is None
    assert capture.verify()["0"].explained


def test_a_bias_shared_by_layers_with_different_weights_is_not_served() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].bias = model[0].bias
    with GradientCapture(model) as capture:
        model(torch.randn(5, 3)).square().sum().backward()
    assert capture.layer_of(model[0].bias) is None
    assert all(verdict.explained for verdict in capture.verify().values())


def test_two_forwards_before_one_backward_add_data_points() -> None:
    model = mlp()
    with GradientCapture(model) as capture:
        (model(torch.randn(5, 3)).square().sum() + model(torch.randn(4, 3)).square().sum()).backward()
    assert capture.gradients()["0"].activations.shape == (9, 1, 3)
    assert_explains(capture, model)


def test_accumulated_backward_passes_add_data_points() -> None:
    model = mlp()
    with GradientCapture(model) as capture:
        for _ in range(3):
            model(torch.randn(5, 3)).square().mean().backward()
    assert capture.gradients()["0"].activations.shape == (15, 1, 3)
    assert_explains(capture, model)


def test_passes_with_different_positions_become_rows() -> None:
    model = mlp()
    with GradientCapture(model) as capture:
        model(torch.randn(5, 2, 3)).square().sum().backward()
        model(torch.randn(4, 3)).square().sum().backward()
    assert capture.gradients()["0"].activations.shape == (14, 1, 3)
    assert_explains(capture, model)


def test_a_retained_graph_is_captured_twice() -> None:
    model = mlp()
    with GradientCapture(model) as capture:
        loss = model(torch.randn(5, 3)).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    assert capture.gradients()["0"].activations.shape == (10, 1, 3)
    assert_explains(capture, model)


@pytest.mark.parametrize("shape", [(3,), (5, 3), (5, 2, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_activations_in_place_after_a_layer_change_nothing(shape: tuple[int, ...], bias: bool) -> None:
    model = mlp(bias, inplace=True)
    with GradientCapture(model) as capture:
        model(torch.randn(shape)).square().sum().backward()
    assert set(capture.gradients()) == {"0", "2", "4"}
    assert_explains(capture, model)


def test_a_frozen_weights_input_may_be_overwritten_later() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    model[0].weight.requires_grad_(False)
    x = torch.randn(5, 3)
    before = x.clone()
    with GradientCapture(model) as capture:
        output = model(x)
        x.zero_()
        output.square().sum().backward()
    torch.testing.assert_close(capture.gradients()["0"].activations.squeeze(1), before)
    assert_explains(capture, model)


def test_frozen_layers_are_passed_over_until_they_are_trained() -> None:
    model = mlp()
    model[2].requires_grad_(False)
    with GradientCapture(model) as capture:
        model(torch.randn(5, 3)).square().sum().backward()
        assert set(capture.gradients()) == {"0", "4"}
        model.zero_grad()
        model[2].requires_grad_(True)
        model(torch.randn(5, 3)).square().sum().backward()
        assert set(capture.gradients()) == {"0", "2", "4"}
        assert_explains(capture, model)


def test_a_forward_without_gradients_leaves_nothing() -> None:
    model = mlp()
    with GradientCapture(model) as capture, torch.no_grad():
        model(torch.randn(5, 3))
    assert not capture.gradients() and not capture.verify()


def test_eval_mode_is_captured_also() -> None:
    model = mlp().eval()
    with GradientCapture(model) as capture:
        model(torch.randn(5, 3)).square().sum().backward()
    assert_explains(capture, model)


def test_a_layer_may_be_called_by_keyword() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(input=x)

    model = Keyword()
    with GradientCapture(model) as capture:
        model(torch.randn(5, 3)).square().sum().backward()
    assert_explains(capture, model)


class Checkpointed(nn.Module):
    """A block that is computed anew in the backward pass, and whose first layer is used outside of it also."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.block, self.reentrant = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.block[0](x)
        return self.block[0](checkpoint(self.block, x, use_reentrant=self.reentrant)).tanh()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("rows", [None, 100])
def test_checkpointed_blocks_are_captured_once(reentrant: bool, rows: int | None) -> None:
    model = Checkpointed(reentrant)
    with GradientCapture(model, rows=rows) as capture:
        for _ in range(2):
            model.zero_grad()
            model(torch.randn(5, 3)).square().sum().backward()
    assert capture.gradients()["block.0"].activations.shape == (5, 3, 3)
    assert_explains(capture, model)


def test_autocast_keeps_the_wider_dtype() -> None:
    model = mlp().float()
    with GradientCapture(model) as capture, torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(5, 3, dtype=torch.float32)).float().square().sum().backward()
    assert capture.gradients()["0"].backprops.dtype == torch.float32
    assert all(verdict.explained for verdict in capture.verify().values())


def test_a_penalty_on_the_gradient_does_not_crash() -> None:
    model, x = mlp(), torch.randn(5, 3, requires_grad=True)
    with GradientCapture(model) as capture:
        (slope,) = torch.autograd.grad(model(x).tanh().sum(), x, create_graph=True)
        slope.square().sum().backward()
    verdict = capture.verify()["0"]
    assert not verdict.explained and "second derivatives" in verdict.reason


def test_functional_transforms_are_left_alone() -> None:
    model, x = mlp(), torch.randn(5, 3)
    with GradientCapture(model) as capture:
        grad(lambda parameters: functional_call(model, parameters, (x,)).sum())(dict(model.named_parameters()))
    assert not capture.gradients()


def test_batched_backward_passes_are_left_alone() -> None:
    model = mlp()
    with GradientCapture(model) as capture:
        output = model(torch.randn(5, 3))
        torch.autograd.grad(output, list(model.parameters()), torch.randn(7, 5, 2), is_grads_batched=True)
    assert not capture.gradients()


def test_nested_checkpoints_belong_to_one_backward_pass() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def block(self, x: Tensor) -> Tensor:
            return self.layer(checkpoint(self.layer, x, use_reentrant=True)).tanh()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(checkpoint(self.block, self.layer(x), use_reentrant=True))

    model = Nested()
    with GradientCapture(model) as capture:
        for _ in range(2):
            model.zero_grad()
            model(torch.randn(5, 3)).square().sum().backward()
    assert capture.gradients()["layer"].activations.shape == (5, 4, 3)
    assert_explains(capture, model)


def test_plain_functions_of_other_layers_stay_usable() -> None:
    model = mlp()
    with GradientCapture(model) as capture:
        functional.linear(model(torch.randn(5, 3)), torch.randn(2, 2)).sum().backward()
    assert_explains(capture, model)
