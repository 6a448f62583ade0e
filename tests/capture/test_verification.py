"""The probe tells the scale of a gradient, and names the cause where the factors do not explain it."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gmn_optim.capture import GradientCapture
from tests import models
from tests.cases import MixedKinds, TiedEmbedding


def mlp(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Return a small network."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def train_once(model: nn.Module, dtype: torch.dtype = torch.float64) -> None:
    """Run one forward and backward pass."""
    model(torch.randn(5, 3, dtype=dtype)).square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ordinary_gradients_are_explained_with_scale_one(dtype: torch.dtype) -> None:
    model = mlp(dtype)
    with GradientCapture(model) as capture:
        train_once(model, dtype)
    assert set(capture.verify()) == {"0", "2"}
    for verdict in capture.verify().values():
        assert verdict.explained and verdict.reason == "" and verdict.scale == pytest.approx(1, rel=1e-2)


def test_a_scaled_loss_shows_as_scale_once_unscaled() -> None:
    model = mlp()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with GradientCapture(model) as capture:
        scaler.scale(model(torch.randn(5, 3, dtype=torch.float64)).square().sum()).backward()
        assert capture.verify()["0"].scale == pytest.approx(1)
        scaler.unscale_(optimizer)
    for verdict in capture.verify().values():
        assert verdict.explained and verdict.scale == pytest.approx(1 / 1024)


def test_clipping_shows_as_scale() -> None:
    model = mlp()
    with GradientCapture(model) as capture:
        train_once(model)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    for verdict in capture.verify().values():
        assert verdict.explained and verdict.scale == pytest.approx(1e-3 / norm.item(), rel=1e-4)


def test_zero_gradients_on_both_sides_are_explained() -> None:
    model = mlp()
    with GradientCapture(model) as capture:
        (0 * model(torch.randn(5, 3, dtype=torch.float64))).sum().backward()
    assert {(verdict.explained, verdict.scale) for verdict in capture.verify().values()} == {(True, 1.0)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_bias_whose_gradient_is_rounding_error_is_no_misfit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)
    with GradientCapture(model) as capture:
        model(torch.randn(500, 3, dtype=dtype)).square().sum().backward()
    assert all(verdict.explained for verdict in capture.verify().values()), capture.verify()


VANISHING = {
    "keys of attention": (models.GPT, lambda: torch.randint(0, models.VOCABULARY, (8, 6)), "blocks.1.attention.k"),
    "before a batch normalization": (models.ResNet, lambda: torch.randn(8, 2, 6, 6), "conv1"),
    "before an instance normalization": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.InstanceNorm1d(4, affine=True), nn.Tanh()),
        lambda: torch.randn(8, 2, 9),
        "0",
    ),
    "before a softmax": (
        lambda: nn.Sequential(nn.Linear(3, 1), nn.Flatten(0), nn.Softmax(0)),
        lambda: torch.randn(8, 3),
        "0",
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", VANISHING)
def test_a_bias_without_gradient_but_for_rounding_is_said_to_vanish(name: str, dtype: torch.dtype) -> None:
    make, draw, layer = VANISHING[name]
    torch.manual_seed(0)
    model, x = make().to(dtype), draw()
    x = x.to(dtype) if x.is_floating_point() else x
    with GradientCapture(model) as capture:
        output = model(x)
        (output * torch.randn_like(output)).sum().backward()
    verdicts = capture.verify()
    assert all(verdict.explained for verdict in verdicts.values())
    assert verdicts[layer].vanishing == ("bias",) and verdicts[layer].scale == pytest.approx(1.0, rel=1e-3)
    assert not any(verdict.vanishing for key, verdict in verdicts.items() if not key.endswith((layer, "attention.k")))


def test_a_weight_can_vanish_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh()).double()
    with GradientCapture(model) as capture:
        output = model(torch.ones(8, 3, dtype=torch.float64))  # of equal inputs the normalization leaves nothing
        (output * torch.randn_like(output)).sum().backward()
    assert capture.verify()["0"].vanishing == ("weight", "bias") and capture.verify()["0"].explained


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_small_gradients_do_not_vanish(scale: float, dtype: torch.dtype) -> None:
    model = mlp(dtype)
    with GradientCapture(model) as capture:
        (model(torch.randn(5, 3, dtype=dtype)).square().sum() * scale).backward()
    assert not any(verdict.vanishing for verdict in capture.verify().values())


def test_gradients_that_are_zero_throughout_do_not_vanish() -> None:
    model = mlp()
    with GradientCapture(model) as capture:
        (0 * model(torch.randn(5, 3, dtype=torch.float64))).sum().backward()
    assert not any(verdict.vanishing for verdict in capture.verify().values())


# ---------------------------------------------------------------------- one weight in layers of several kinds

TIED = {
    "embedding and head": (TiedEmbedding, lambda: torch.randint(0, 9, (8, 3)), ["last", "table"]),
    "language model": (lambda: models.GPT(tied=True), lambda: torch.randint(0, 11, (4, 6)), ["head", "tokens"]),
}


@pytest.mark.parametrize("rows", [None, 10])
@pytest.mark.parametrize("name", TIED)
def test_what_uses_of_all_kinds_give_adds_up_to_the_gradient_and_explains_it(name: str, rows: int | None) -> None:
    make, draw, layers = TIED[name]
    torch.manual_seed(0)
    model = make().double()
    with GradientCapture(model, rows=rows) as capture:
        model(draw()).square().sum().backward()
    verdict, gradients = capture.verify()[layers[0]], capture.gradients()
    assert verdict.explained and verdict.scale == pytest.approx(1.0) and layers[1] not in capture.verify()
    weight = model.get_submodule(layers[0]).weight
    assert capture.layer_of(weight) == layers[0] and set(layers) <= capture.layers.keys()
    if rows is None:
        shares = [gradients.mean_gradient(layer)["weight"] for layer in layers]
        assert all(share.any() for share in shares)
        torch.testing.assert_close(sum(shares), weight.grad, rtol=1e-10, atol=1e-12)


def test_a_use_that_no_factors_tell_of_is_found_beside_uses_of_several_kinds() -> None:
    model = TiedEmbedding()
    with GradientCapture(model) as capture:
        (model(torch.randint(0, 9, (8, 3))).square().sum() + model.table.weight.square().sum()).backward()
    assert not capture.verify()["last"].explained and "functional use" in capture.verify()["last"].reason


def test_kinds_that_read_a_weight_in_different_orders_are_named() -> None:
    model = MixedKinds()
    with GradientCapture(model) as capture:
        model(torch.randn(8, 5)).square().sum().backward()
    assert not capture.verify()["first"].explained and "another order" in capture.verify()["first"].reason
    assert set(capture.gradients()) == {"last"} == set(capture.served_parameters())


def test_the_bias_stands_in_for_a_frozen_weight() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    with GradientCapture(model) as capture:
        train_once(model)
        assert capture.verify()["0"].explained
        model[0].bias.grad[0] += 1
    assert not capture.verify()["0"].explained


def test_a_layer_without_gradient_is_not_judged() -> None:
    model = mlp()
    with GradientCapture(model) as capture:
        model[0](torch.randn(5, 3, dtype=torch.float64)).sum().backward()
    assert set(capture.verify()) == {"0"}


class Functional(nn.Module):
    """Uses its layer's weight once through the module and once around it, in a way that is not understood."""

    def __init__(self, through_module: bool) -> None:
        super().__init__()
        self.through_module, self.layer, self.head = through_module, nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x).tanh() if self.through_module else x
        return self.head(functional.linear(x, 2 * self.layer.weight))


@pytest.mark.parametrize("through_module", [True, False])
def test_functional_use_that_is_not_understood_is_named(through_module: bool) -> None:
    model = Functional(through_module)
    with GradientCapture(model) as capture:
        model(torch.randn(5, 3)).square().sum().backward()
    verdicts = capture.verify()
    assert verdicts["head"].explained and not verdicts["layer"].explained
    assert "functional use" in verdicts["layer"].reason


def test_gradients_from_before_are_named() -> None:
    model = mlp()
    train_once(model)
    with GradientCapture(model) as capture:
        train_once(model)
    assert "zero_grad missing" in capture.verify()["0"].reason


def test_a_layer_called_but_not_reached_is_named() -> None:
    model = mlp()
    train_once(model)
    with GradientCapture(model) as capture, torch.no_grad():
        model(torch.randn(5, 3, dtype=torch.float64))
    assert "no backward pass reached it" in capture.verify()["0"].reason


def test_hooks_that_never_ran_are_named() -> None:
    model = mlp()
    train_once(model)
    assert "torch.compile" in GradientCapture(model).verify()["0"].reason


@pytest.mark.parametrize("capture_first", [True, False])
def test_a_compiled_model_trains_and_is_named(capture_first: bool) -> None:
    model, x = mlp(), torch.randn(5, 3, dtype=torch.float64)
    early = GradientCapture(model) if capture_first else None
    compiled = torch.compile(model, backend="eager")
    compiled(x).sum().backward()
    capture = early or GradientCapture(model)
    compiled(x).sum().backward()
    verdict = capture.verify()["0"]
    assert not verdict.explained
    assert "torch.compile" in verdict.reason


def test_gradients_zeroed_or_broken_after_the_backward_pass_are_not_explained() -> None:
    model = mlp()
    with GradientCapture(model) as capture:
        train_once(model)
        model[0].weight.grad.zero_()
        model[2].weight.grad[0, 0] = float("inf")
    verdicts = capture.verify()
    assert "set to zero" in verdicts["0"].reason and "not finite" in verdicts["2"].reason


def test_a_bias_used_elsewhere_is_found() -> None:
    model = mlp()
    with GradientCapture(model) as capture:
        (model(torch.randn(5, 3, dtype=torch.float64)).sum() + model[0].bias.square().sum()).backward()
    verdicts = capture.verify()
    assert verdicts["2"].explained and "bias" in verdicts["0"].reason


def test_a_bias_clipped_by_itself_is_no_misfit() -> None:
    model = mlp()
    with GradientCapture(model) as capture:
        train_once(model)
        model[0].bias.grad.mul_(0.1)
    assert capture.verify()["0"].explained
