"""Weights that are used as functions are captured as if their layers had been called."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from gmn_optim.capture import GradientCapture, register_layer
from gmn_optim.capture.adapters import _ADAPTERS
from gmn_optim.capture.linear import LinearAdapter
from gmn_optim.neurons import LayerWiring

# Claims of exactness are made in float64.
pytestmark = pytest.mark.usefixtures("seeded", "double_precision")


class Functions(nn.Module):
    """Two layers and a forward pass that is given."""

    def __init__(self, compute: Callable[["Functions", Tensor], Tensor], bias: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4, bias=bias), nn.Linear(4, 3, bias=bias)
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        """Return what the function returns."""
        return self.compute(self, x)


Compute = Callable[[Functions, Tensor], Tensor]

FUNCTIONS: dict[str, Compute] = {
    "linear": lambda m, x: functional.linear(m.first(x).tanh(), m.second.weight, m.second.bias),
    "both": lambda m, x: functional.linear(functional.linear(x, m.first.weight, m.first.bias), m.second.weight),
    "without bias": lambda m, x: m.second(functional.linear(x, m.first.weight).tanh()),
    "twice": lambda m, x: m.second(functional.linear(m.first(x).tanh() @ m.first.weight, m.first.weight)),
    "beside the module": lambda m, x: m.second(m.first(x) + functional.linear(x, m.first.weight, m.first.bias)),
    "some without bias": lambda m, x: m.second(m.first(x) + functional.linear(x.tanh(), m.first.weight)),
    "matmul": lambda m, x: m.first(x).tanh() @ m.second.weight.T @ m.second.weight @ m.second.weight.mT,
    "cut in two": lambda m, x: m.second(torch.cat([functional.linear(x, w) for w in m.first.weight.chunk(2)], -1)),
    "of what follows": lambda m, x: functional.linear(m.second(m.first(x)), m.first.weight),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3,), (5, 3), (5, 2, 3)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_uses_outside_of_modules_are_explained(name: str, shape: tuple[int, ...], bias: bool) -> None:
    model = Functions(FUNCTIONS[name], bias)
    with GradientCapture(model) as capture:
        model(torch.randn(shape)).square().sum().backward()
    verdicts = capture.verify()
    assert set(verdicts) == {"first", "second"}
    assert all(verdict.explained for verdict in verdicts.values()), verdicts
    gradients = capture.gradients()
    for layer, parameters in capture.served_parameters().items():
        assert "weight" in parameters
        for slot, parameter in parameters.items():
            if parameter.grad is not None:
                torch.testing.assert_close(gradients.mean_gradient(layer)[slot], parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if "bias" not in name])
def test_each_data_points_share_is_exact(name: str) -> None:
    model, x = Functions(FUNCTIONS[name], bias=False), torch.randn(5, 2, 3)
    with GradientCapture(model) as capture:
        model(x).square().sum().backward()

    def loss(parameters: dict[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(model, parameters, (one[None],)).square().sum()

    expected = vmap(grad(loss), (None, 0))(dict(model.named_parameters()), x)
    for layer in ("first", "second"):
        found = capture.gradients().per_sample_gradients(layer)["weight"]
        torch.testing.assert_close(found, expected[f"{layer}.weight"], rtol=1e-9, atol=1e-12)


def test_a_bias_that_some_uses_lack_is_not_served_from_then_on() -> None:
    model = Functions(FUNCTIONS["some without bias"])
    with GradientCapture(model) as capture:
        assert capture.layer_of(model.first.bias) == "first"
        for _ in range(2):
            model.zero_grad()
            capture.clear()
            model(torch.randn(5, 3)).square().sum().backward()
            assert capture.layer_of(model.first.bias) is None and capture.layer_of(model.second.bias) == "second"
            assert all(verdict.explained for verdict in capture.verify().values())


@pytest.mark.parametrize("rows", [4, 100])
def test_rows_are_shared_by_all_uses(rows: int) -> None:
    model = Functions(FUNCTIONS["beside the module"])
    with GradientCapture(model, rows=rows) as capture:
        model(torch.randn(8, 3)).square().sum().backward()
    assert capture.gradients()["first"].activations.shape[:2] == (min(8, rows // 2), 2)
    assert capture.verify()["first"].explained


def test_functions_outside_of_the_forward_pass_are_named() -> None:
    model = Functions(FUNCTIONS["linear"])
    with GradientCapture(model) as capture:
        functional.linear(model.first(torch.randn(5, 3)), model.second.weight).sum().backward()
    verdicts = capture.verify()
    assert verdicts["first"].explained and not verdicts["second"].explained
    assert "the model's own forward pass" in verdicts["second"].reason


def test_what_a_forward_pass_was_given_is_not_searched() -> None:
    model = Functions(FUNCTIONS["both"])
    with GradientCapture(model) as capture:
        with capture.paused():
            hidden = model(torch.randn(5, 3))
        model(hidden).square().sum().backward()
    assert capture.gradients()["first"].activations.shape == (5, 1, 3)
    assert not capture.verify()["first"].explained


def test_a_forward_pass_without_capture_leaves_nothing_to_its_backward_pass() -> None:
    model = Functions(FUNCTIONS["both"])
    with GradientCapture(model) as capture:
        with capture.paused():
            loss = model(torch.randn(5, 3)).square().sum()
        loss.backward()
    assert not capture.gradients()


def test_layers_that_are_called_by_themselves_are_not_counted_again() -> None:
    model = Functions(lambda m, x: functional.linear(x, m.second.weight))
    with GradientCapture(model) as capture:
        model(model.first(torch.randn(5, 3))).square().sum().backward()
        assert all(verdict.explained for verdict in capture.verify().values())
    assert len(capture.gradients()["first"].activations) == 5


def test_a_bias_at_other_rows_than_the_weights_is_missing_there() -> None:
    def crossed(model: Functions, x: Tensor) -> Tensor:
        weights, biases = model.first.weight.chunk(2), model.first.bias.chunk(2)
        halves = [functional.linear(x, *pair) for pair in zip(weights, reversed(biases), strict=True)]
        return model.second(torch.cat(halves, -1))

    model = Functions(crossed)
    with GradientCapture(model) as capture:
        model(torch.randn(5, 3)).square().sum().backward()
    assert capture.layer_of(model.first.bias) is None and capture.verify()["first"].explained


def test_a_state_that_is_carried_over_is_not_counted_twice() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.state = nn.Linear(3, 3), torch.zeros(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.state = (functional.linear(self.state, self.layer.weight) + self.layer(x)).tanh()
            return self.state

    model = Recurrent()
    with GradientCapture(model) as capture:
        sum(model(torch.randn(5, 3)) for _ in range(3)).square().sum().backward()
    assert capture.verify()["layer"].explained


def test_uses_outside_of_a_module_tie_no_neurons_of_their_own() -> None:
    def wiring(compute: Compute) -> dict[str, LayerWiring]:
        model = Functions(compute)
        with GradientCapture(model) as capture:
            model(torch.randn(5, 3))
        return capture.wiring()

    plain = wiring(lambda m, x: m.second(m.first(x)))
    assert plain["second"].inputs == plain["first"].outputs
    torn = wiring(lambda m, x: m.second(functional.linear(x, m.first.weight)) + m.first(x).sum())
    assert not set(torn["second"].inputs) & set(torn["first"].outputs)


def test_a_layer_that_reads_its_weight_transposed_is_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    class Table(nn.Module):
        """A linear layer whose weight lies as (i, o)."""

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.table

    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Table()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + (x.tanh() @ self.layer.table) @ self.layer.table.T @ self.layer.table

    monkeypatch.setattr("gmn_optim.capture.adapters._ADAPTERS", dict(_ADAPTERS))

    @register_layer(Table)
    class TableAdapter(LinearAdapter):
        """Knows the layer above."""

        parameter_names = ("table",)

        def recompose(self, module: nn.Module, gradient: object) -> dict[str, Tensor]:
            return {"table": gradient.sum_of_outer_products().mT}

        def widths(self, module: nn.Module) -> tuple[int, int]:
            return tuple(module.table.shape)

        def gradient_matrix(self, module: nn.Module, gradient: Tensor) -> Tensor:
            return gradient.mT

    model = Reading()
    with GradientCapture(model) as capture:
        model(torch.randn(5, 3)).square().sum().backward()
    assert capture.verify()["layer"].explained
    assert capture.gradients()["layer"].activations.shape == (5, 4, 3)


def test_a_layer_of_another_kind_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    monkeypatch.setattr("gmn_optim.capture.adapters._ADAPTERS", dict(_ADAPTERS))

    @register_layer(Doubled)
    class DoubledAdapter(LinearAdapter):
        def activations(self, module: nn.Module, layer_input: Tensor) -> Tensor:
            return super().activations(module, 2 * layer_input)

    model = Functions(lambda m, x: m.second(m.first(x)))
    model.first = Doubled(3, 4)
    with GradientCapture(model) as capture:
        model(torch.randn(5, 3)).square().sum().backward()
        assert all(verdict.explained for verdict in capture.verify().values())
        model.compute = FUNCTIONS["some without bias"]
        model.zero_grad()
        capture.clear()
        model(torch.randn(5, 3)).square().sum().backward()
    assert not capture.verify()["first"].explained and capture.verify()["second"].explained
    assert capture.gradients()["first"].activations.shape == (5, 1, 3)


def test_two_captures_see_the_same() -> None:
    model = Functions(FUNCTIONS["twice"])
    with GradientCapture(model) as one, GradientCapture(model) as other:
        model(torch.randn(5, 3)).square().sum().backward()
    for capture in (one, other):
        assert all(verdict.explained for verdict in capture.verify().values())
