"""The front end for ``torch.func`` sees what hooks see, maps over parameters, and notices another forward pass."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.utils import parametrize

from gmn_optim.capture import GradientCapture
from gmn_optim.capture.functional import CapturePlan, capture_gradients, plan_capture
from gmn_optim.errors import CaptureError
from tests import models
from tests.cases import MixedKinds, TiedEmbedding, snapshot

# Claims of exactness are made in float64.
pytestmark = pytest.mark.usefixtures("double_precision", "seeded")


def mlp(bias: bool = True, inplace: bool = False) -> nn.Sequential:
    """Return a small network."""
    return nn.Sequential(nn.Linear(3, 3, bias=bias), nn.ReLU(inplace=inplace), nn.Linear(3, 3, bias=bias), nn.Tanh())


class Reused(nn.Module):
    """One layer used three times, another one before."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(3, 3)
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the last use."""
        x = self.before(x)
        for _ in range(3):
            x = self.layer(x).tanh()
        return x


class OutOfOrder(nn.Module):
    """Layers that are called in another order than they were made, two of them with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, 3)
        self.first = nn.Linear(3, 3)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the layer that was made first."""
        return self.last(self.first(x).tanh())


class NeverCalled(nn.Module):
    """A layer that is never called has the weight of one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(3, 3)
        self.used = nn.Linear(3, 3)
        self.used.weight = self.spare.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the layer that is used."""
        return self.used(x)


def tied() -> nn.Sequential:
    """Return two layers with one weight and a bias each."""
    model = mlp()
    model[2].weight = model[0].weight
    return model


def tied_throughout() -> nn.Sequential:
    """Return two layers with one weight and one bias."""
    model = tied()
    model[2].bias = model[0].bias
    return model


def same_bias() -> nn.Sequential:
    """Return two layers with a weight each and one bias."""
    model = mlp()
    model[2].bias = model[0].bias
    return model


def bias_as_weight() -> nn.Sequential:
    """Return two layers, the weight of one being first in line though its bias was registered before."""
    model = mlp()
    layer = model[2]
    weight, bias = layer.weight, model[0].bias
    layer._parameters.clear()
    layer.register_parameter("bias", bias)
    layer.register_parameter("weight", weight)
    return model


def parametrized() -> nn.Sequential:
    """Return a layer whose weight is computed, and one whose weight is plain."""
    model = mlp()
    parametrize.register_parametrization(model[0], "weight", nn.Tanh())
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "no bias": lambda: mlp(bias=False),
    "in place": lambda: mlp(inplace=True),
    "one layer": lambda: nn.Linear(3, 3),
    "reused": Reused,
    "tied": tied,
    "tied throughout": tied_throughout,
    "tied out of order": OutOfOrder,
    "tied to a layer that is never called": NeverCalled,
    "one bias for two weights": same_bias,
    "bias registered before weight": bias_as_weight,
    "parametrized": parametrized,
    "no layers": nn.PReLU,
}
SHAPES = {"vector": (3,), "batch": (5, 3), "positions": (5, 2, 3), "grid": (5, 2, 2, 3)}


def loss_of(model: nn.Module, x: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    """Return a loss as a function of parameters."""
    return lambda parameters: functional_call(model, parameters, (x,)).square().mean()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MODELS)
def test_the_two_front_ends_agree(name: str, shape: str) -> None:
    model, x = MODELS[name](), torch.randn(SHAPES[shape])
    captured = capture_gradients(model, loss_of(model, x), snapshot(model))
    with GradientCapture(model) as capture:
        loss = model(x).square().mean()
        loss.backward()
    expected = capture.gradients()
    torch.testing.assert_close(captured.loss, loss.detach())
    for parameter, found in captured.gradients.items():
        gradient = model.get_parameter(parameter).grad
        expected_gradient = torch.zeros_like(found) if gradient is None else gradient
        torch.testing.assert_close(found, expected_gradient, rtol=1e-12, atol=1e-14)
    assert set(captured.factors) == set(expected)
    for layer in expected:
        for found, wanted in zip(captured.factors[layer], expected[layer], strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
        one, other = captured.factors.mean_gradient(layer), expected.mean_gradient(layer)
        assert one.keys() == other.keys()
        for slot in one:
            torch.testing.assert_close(one[slot], other[slot], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", MODELS)
def test_factors_recompose_to_the_gradients_beside_them(name: str) -> None:
    model, x = MODELS[name](), torch.randn(5, 3)
    captured = capture_gradients(model, loss_of(model, x), snapshot(model))
    for layer in captured.factors:
        for slot, found in captured.factors.mean_gradient(layer).items():
            expected = captured.gradients[f"{layer}.{slot}".lstrip(".")]
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_mapped_over_parameters_it_equals_a_loop(name: str, planned: bool) -> None:
    model, x = MODELS[name](), torch.randn(3, 5, 3)
    sets = [{key: torch.randn_like(value) for key, value in snapshot(model).items()} for _ in range(3)]
    plan = plan_capture(model, lambda: loss_of(model, x[0])(sets[0])) if planned else None

    def capture(parameters: dict[str, Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, tuple]]:
        captured = capture_gradients(model, loss_of(model, x), parameters, plan)
        return captured.loss, captured.gradients, {name: tuple(pair) for name, pair in captured.factors.items()}

    found = vmap(capture)({key: torch.stack([each[key] for each in sets]) for key in sets[0]}, x)
    for k, parameters in enumerate(sets):
        mine = torch.utils._pytree.tree_map(lambda value, k=k: value[k], found)
        for one, other in zip(
            torch.utils._pytree.tree_leaves(mine),
            torch.utils._pytree.tree_leaves(capture(parameters, x[k])),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("tree", [dict, tuple, list])
def test_parameters_may_be_any_tree(tree: type) -> None:
    model, x = mlp(), torch.randn(5, 3)
    named = snapshot(model)
    given = named if tree is dict else tree(named.values())

    def loss(parameters: object) -> Tensor:
        values = parameters.values() if tree is dict else parameters
        return loss_of(model, x)(dict(zip(named, values, strict=True)))

    captured = capture_gradients(model, loss, given)
    assert type(captured.gradients) is tree
    torch.testing.assert_close(
        captured.factors.mean_gradient("0")["weight"], torch.utils._pytree.tree_leaves(captured.gradients)[0]
    )


def test_a_loss_that_calls_a_layer_with_other_data_points_has_them_along_the_batch() -> None:
    model = nn.Linear(3, 2)
    batches = torch.randn(5, 3), torch.randn(2, 3), torch.randn(2, 4, 3)

    def loss(parameters: dict[str, Tensor], number: int) -> Tensor:
        return sum(functional_call(model, parameters, (x,)).square().sum() for x in batches[:number])

    for number, shape in ((2, (7, 1, 3)), (3, (15, 1, 3))):
        captured = capture_gradients(model, lambda parameters, n=number: loss(parameters, n), snapshot(model))
        assert captured.factors[""].activations.shape == shape
        torch.testing.assert_close(captured.factors.mean_gradient("")["weight"], captured.gradients["weight"])


def test_the_plan_names_calls_in_order_and_who_reports_them() -> None:
    model = OutOfOrder()
    plan = plan_capture(model, lambda: model(torch.ones(5, 3)))
    assert [(call.layer, call.owner, call.parameters) for call in plan.calls] == [
        ("first", "last", ("weight",)),
        ("last", "last", ("weight",)),
    ]
    assert plan.layers == ("first", "last") and plan.calls[0].shape == (5, 3)


def test_planning_leaves_no_trace() -> None:
    model = mlp()
    plan_capture(model, lambda: model(torch.ones(5, 3)))
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ZeroDivisionError):
        plan_capture(model, lambda: 1 / 0)
    assert not any(module._forward_hooks for module in model.modules())


def test_capturing_leaves_no_trace_not_even_after_an_error() -> None:
    model, x = mlp(), torch.randn(5, 3)
    capture_gradients(model, loss_of(model, x), snapshot(model))
    with pytest.raises(ZeroDivisionError):
        capture_gradients(model, lambda parameters: 1 / 0, snapshot(model))
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


MISFITS = {
    "a call too many": (
        lambda calls: calls[:-1],
        "call 1 of the forward pass is layer '2', the plan expected no further call",
    ),
    "a call too few": (
        lambda calls: (*calls, calls[0]),
        "call 2 of the forward pass is the end of the forward pass, the plan expected '0'",
    ),
    "another layer": (lambda calls: calls[::-1], "call 0 of the forward pass is layer '0', the plan expected '2'"),
    "an empty plan": (lambda calls: (), "call 0 of the forward pass is layer '0', the plan expected no further call"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_another_forward_pass_than_planned_is_refused(misfit: str) -> None:
    model, x = mlp(), torch.randn(5, 3)
    plan = plan_capture(model, lambda: model(x))
    change, message = MISFITS[misfit]
    with pytest.raises(CaptureError, match=f"{message}; plan this forward pass anew"):
        capture_gradients(model, loss_of(model, x), snapshot(model), CapturePlan(change(plan.calls)))
    assert not any(module._forward_hooks for module in model.modules())


def test_probes_have_the_dtype_of_the_parameters() -> None:
    model, x = mlp().float(), torch.randn(5, 3, dtype=torch.float32)
    captured = capture_gradients(model, loss_of(model, x), snapshot(model))
    assert captured.factors["0"].backprops.dtype == captured.factors["0"].activations.dtype == torch.float32


WHOLE_MODELS = {
    "skip connections": (models.SkipMLP, lambda: torch.randn(5, 5)),
    "language model": (models.GPT, lambda: torch.randint(0, models.VOCABULARY, (5, models.TOKENS))),
    "vision model": (lambda: models.ViT(True), lambda: torch.randn(5, 1, 4, 4)),
    "upsampling": (lambda: models.Upsampling(2), lambda: torch.randn(5, 2, 4, 4)),
    "tied embedding": (TiedEmbedding, lambda: torch.randint(0, 9, (5, 3))),
    "tied language model": (
        lambda: models.GPT(tied=True, blocks=1),
        lambda: torch.randint(0, models.VOCABULARY, (5, models.TOKENS)),
    ),
    "mixed kinds": (MixedKinds, lambda: torch.randn(5, 5)),
}


@pytest.mark.parametrize("name", WHOLE_MODELS)
def test_the_two_front_ends_agree_on_models_of_all_layer_kinds(name: str) -> None:
    make, draw = WHOLE_MODELS[name]
    model, x = make(), draw()
    captured = capture_gradients(model, loss_of(model, x), snapshot(model))
    with GradientCapture(model) as capture:
        model(x).square().mean().backward()
    expected = capture.gradients()
    assert set(captured.factors) == set(expected)
    for layer, factors in expected.items():
        torch.testing.assert_close(captured.factors[layer], factors, rtol=1e-10, atol=1e-13)
        found, wanted = (each.mean_gradient(layer) for each in (captured.factors, expected))
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", WHOLE_MODELS)
def test_models_of_all_layer_kinds_map_over_their_parameters(name: str) -> None:
    make, draw = WHOLE_MODELS[name]
    model, x = make(), torch.stack([draw() for _ in range(2)])
    sets = [{key: torch.randn_like(value) for key, value in snapshot(model).items()} for _ in range(2)]
    plan = plan_capture(model, lambda: loss_of(model, x[0])(sets[0]))

    def capture(parameters: dict[str, Tensor], x: Tensor) -> list[dict[str, Tensor]]:
        factors = capture_gradients(model, loss_of(model, x), parameters, plan).factors
        return [factors.mean_gradient(layer) for layer in sorted(factors)]

    found = vmap(capture)({key: torch.stack([each[key] for each in sets]) for key in sets[0]}, x)
    for k, parameters in enumerate(sets):
        mine = torch.utils._pytree.tree_map(lambda value, k=k: value[k], found)
        torch.testing.assert_close(mine, capture(parameters, x[k]), rtol=1e-9, atol=1e-12)
