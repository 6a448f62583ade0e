"""The public assertions pass what is right, fail what is wrong with its name and size, and refuse to test nothing."""

import re
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from gmn_optim.capture import adapters
from gmn_optim.capture.adapters import register_layer
from gmn_optim.capture.linear import LinearAdapter
from gmn_optim.gradients import DecomposedGradient
from gmn_optim.neurons import NeuronSpaces, chain_spaces
from gmn_optim.nn import GradMetaNet, GradMetaNetConfig, LayerFeatures
from gmn_optim.rule import RuleConfig
from gmn_optim.rule.body import PerParameterMLP, bodies
from gmn_optim.testing import (
    assert_equivariant,
    assert_recomposes,
    assert_untrained_is_nominal,
    permute_neurons,
    permute_parameters,
    random_permutations,
)

SPACES = chain_spaces([4, 3, 2])
Output = Tensor | list[LayerFeatures]


def product(h: Tensor, spaces: NeuronSpaces) -> list[LayerFeatures]:
    """Return the sum of a weight's two neurons, and the neuron of a bias."""
    outputs = []
    for ports in spaces.layers:
        outs, ins = h[spaces.place(ports.output_space)], h[spaces.place(ports.input_space)]
        outputs.append(LayerFeatures(outs[:, None] + ins, outs))
    return outputs


def numbered(h: Tensor) -> Tensor:
    """Return features with each neuron's number added."""
    return h + torch.arange(h.shape[-2], dtype=h.dtype)[:, None]


RIGHT: dict[str, Callable[[Tensor, NeuronSpaces, Tensor | None], Output]] = {
    "weights": lambda sets, spaces, neurons: product(sets.mean(0), spaces),
    "neurons": lambda sets, spaces, neurons: sets.amax(0),
    "sets": lambda sets, spaces, neurons: sets - sets.mean(1, keepdim=True),
    "in place": lambda sets, spaces, neurons: sets.mul_(2.0).sum(0),
}
WRONG: dict[str, tuple[Callable[[Tensor, NeuronSpaces, Tensor | None], Output], str]] = {
    "first data point": (lambda sets, spaces, neurons: sets[0], "changes with the order of the data points"),
    "weights of the last data point": (
        lambda sets, spaces, neurons: product(sets[-1], spaces),
        "changes with the order of the data points; relative errors: 0.weight",
    ),
    "data points summed up one by one": (
        lambda sets, spaces, neurons: sets.cumsum(0),
        "does not follow the order of the data points",
    ),
    "neurons by number": (
        lambda sets, spaces, neurons: sets.mean(0) * numbered(torch.zeros_like(sets[0])),
        "does not follow permutations of neurons",
    ),
    "weights by number": (
        lambda sets, spaces, neurons: product(sets.mean(0) * numbered(torch.ones_like(sets[0])), spaces),
        "does not follow permutations of neurons",
    ),
    "sets by number": (lambda sets, spaces, neurons: sets.cumsum(1), "does not follow permutations of neurons"),
    "columns not moved": (
        lambda sets, spaces, neurons: [
            LayerFeatures(layer.weight.cumsum(1), layer.bias) for layer in product(sets.mean(0), spaces)
        ],
        "does not follow permutations of neurons; relative errors: 0.weight .*, 0.bias .*, 1.weight",
    ),
    "not a number where neurons are ordered": (
        lambda sets, spaces, neurons: sets.mean(0).where(sets.mean(0)[4, 0] > sets.mean(0)[5, 0], torch.nan),
        "relative errors: .*inf|does not follow",
    ),
    "zero": (lambda sets, spaces, neurons: torch.zeros_like(sets), "nothing is tested: the output is zero in space 0"),
    "zero weights": (
        lambda sets, spaces, neurons: [
            layer._replace(weight=layer.weight * 0) for layer in product(sets.mean(0), spaces)
        ],
        "nothing is tested: the output is zero in 0.weight, 1.weight",
    ),
    "constant": (lambda sets, spaces, neurons: torch.ones_like(sets), "the same for other inputs in space 0"),
    "too few neurons": (lambda sets, spaces, neurons: sets[:, 1:], r"output is \(7, 8, 2\), expected"),
    "too few layers": (lambda sets, spaces, neurons: product(sets.mean(0), spaces)[:1], "features of 1 layers"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RIGHT)
def test_equivariant_functions_pass(name: str, dtype: torch.dtype) -> None:
    assert_equivariant(RIGHT[name], SPACES, in_channels=2, dtype=dtype)


@pytest.mark.parametrize("name", WRONG)
def test_functions_that_are_not_equivariant_fail_with_the_reason(name: str) -> None:
    function, reason = WRONG[name]
    with pytest.raises(AssertionError, match=reason):
        for seed in range(4):  # one of the cases fails for half of all inputs
            assert_equivariant(function, SPACES, in_channels=2, seed=seed)


class PositionsOfNeurons(nn.Module):
    """A GradMetaNet that is told the number of every hidden neuron."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = GradMetaNet(3, config=GradMetaNetConfig(width=8)).double()

    def forward(self, sets: Tensor, spaces: NeuronSpaces, neurons: Tensor | None) -> list[LayerFeatures]:
        """Return features of every layer's parameters."""
        numbers = numbered(torch.zeros_like(sets[..., :1])) / 10
        return self.network(torch.cat([sets, numbers], dim=-1), spaces, neurons)


def test_a_network_that_knows_hidden_neurons_by_number_fails() -> None:
    with pytest.raises(AssertionError, match="does not follow permutations of neurons"):
        assert_equivariant(PositionsOfNeurons(), SPACES, in_channels=2)


def test_a_zero_head_is_refused() -> None:
    network = GradMetaNet(2).double()
    for layer in (network.product.to_weight, network.product.to_bias):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    with pytest.raises(
        AssertionError, match="the output is zero in 0.weight, 0.bias, 1.weight, 1.bias; draw a random head"
    ):
        assert_equivariant(network, SPACES, in_channels=2)


@pytest.mark.parametrize(("widths", "points"), [([4, 1, 2], 7), ([4, 2], 7), ([4, 3, 2], 1)])
def test_where_nothing_can_be_swapped_nothing_is_tested(widths: list[int], points: int) -> None:
    with pytest.raises(AssertionError, match="nothing is tested"):
        assert_equivariant(RIGHT["neurons"], chain_spaces(widths), in_channels=2, data_points=points)


def test_the_size_of_the_error_and_the_tolerance_are_told() -> None:
    def nearly(sets: Tensor, spaces: NeuronSpaces, neurons: Tensor | None) -> Tensor:
        return sets.mean(0) * (1 + 1e-6 * numbered(torch.zeros_like(sets[0])))

    with pytest.raises(
        AssertionError, match=r"space 0 \(input\) 0.0e\+00, space 1 \(hidden\) \d\.\de-06, .*tolerance 1e-09"
    ):
        assert_equivariant(nearly, SPACES, in_channels=2)
    assert_equivariant(nearly, SPACES, in_channels=2, tolerance=1e-4)
    assert_equivariant(nearly, SPACES, in_channels=2, dtype=torch.float32)


def test_features_of_neurons_reach_the_network_and_are_permuted() -> None:
    seen: list[Tensor | None] = []

    def network(sets: Tensor, spaces: NeuronSpaces, neurons: Tensor | None) -> Tensor:
        seen.append(neurons)
        return sets.mean(0) if neurons is None else sets.mean(0) * neurons.sum(-1, keepdim=True)

    assert_equivariant(network, SPACES, in_channels=2, neuron_channels=3)
    assert all(each.shape == (9, 3) for each in seen) and any(not torch.equal(each, seen[0]) for each in seen)
    seen.clear()
    assert_equivariant(network, SPACES, in_channels=2)
    assert seen and all(each is None for each in seen)


def test_the_global_random_state_stays_as_it_is() -> None:
    layer, before = nn.Sequential(nn.Linear(3, 2), nn.Dropout()), torch.get_rng_state()
    assert_equivariant(RIGHT["neurons"], SPACES, in_channels=2)
    assert_recomposes(layer, torch.ones(5, 3))
    assert_untrained_is_nominal(RuleConfig())
    assert torch.equal(torch.get_rng_state(), before)


def test_the_same_seed_gives_the_same_inputs_and_another_one_others() -> None:
    inputs: list[Tensor] = []

    def network(sets: Tensor, spaces: NeuronSpaces, neurons: Tensor | None) -> Tensor:
        inputs.append(sets.clone())
        return sets.mean(0)

    for seed in (0, 0, 1):
        assert_equivariant(network, SPACES, in_channels=2, seed=seed)
    one, two, three = inputs[:4], inputs[4:8], inputs[8:]
    assert all(map(torch.equal, one, two)) and not torch.equal(one[0], three[0])


@pytest.mark.parametrize("seed", range(20))
def test_permutations_move_what_they_may_and_nothing_else(seed: int) -> None:
    spaces = chain_spaces([3, 2, 5, 1, 2])
    orders = random_permutations(spaces, torch.Generator().manual_seed(seed))
    for order, space in zip(orders, spaces.spaces, strict=True):
        assert sorted(order.tolist()) == list(range(space.width))
        moved = order.tolist() != list(range(space.width))
        assert moved == (space.kind == "hidden" and space.width > 1)
    everywhere = random_permutations(spaces, torch.Generator().manual_seed(seed), ("input", "output"))
    assert [order.tolist() == list(range(len(order))) for order in everywhere] == [False, True, True, True, False]


def test_permuted_neurons_and_parameters_are_those_of_a_permuted_network() -> None:
    torch.manual_seed(0)
    orders = random_permutations(SPACES, torch.Generator(), ("input", "hidden", "output"))
    h = torch.randn(5, SPACES.size, 2)
    moved = permute_neurons(h, SPACES, orders)
    for number, order in enumerate(orders):
        assert torch.equal(moved[:, SPACES.place(number)], h[:, SPACES.place(number)][:, order])
    for found, expected in zip(
        permute_parameters(product(h[0], SPACES), SPACES, orders), product(moved[0], SPACES), strict=True
    ):
        assert torch.equal(found.weight, expected.weight) and torch.equal(found.bias, expected.bias)


# ---------------------------------------------------------------------- assert_recomposes


@pytest.fixture(name="own_registry")
def fixture_own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget what a test registers."""
    monkeypatch.setattr(adapters, "_ADAPTERS", dict(adapters._ADAPTERS))
    yield


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
    "no served layer": (nn.LayerNorm(3), torch.ones(5, 3), "no adapter serves a parameter of this LayerNorm"),
    "frozen": (nn.Linear(3, 2).requires_grad_(False), torch.ones(5, 3), "no adapter serves"),
    "zero input": (nn.Linear(3, 2), torch.zeros(5, 3), "weight: nothing is tested, its gradient is zero"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_where_there_is_no_gradient_nothing_is_tested(name: str) -> None:
    module, x, reason = NOTHING[name]
    with pytest.raises(AssertionError, match=re.escape(reason)):
        assert_recomposes(module, x)


# ---------------------------------------------------------------------- assert_untrained_is_nominal


def test_a_body_that_does_not_start_at_zero_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Eager(PerParameterMLP):
        """Starts with an output that is not zero."""

        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            nn.init.ones_(self.output.bias)

    monkeypatch.setattr(bodies, "_entries", {**bodies._entries, "eager": Eager})
    with pytest.raises(
        AssertionError, match="step 0 of the untrained rule is not its nominal term's; relative errors: "
    ):
        assert_untrained_is_nominal(RuleConfig(body="eager"))
