"""assert_equivariant passes what is right, fails what is wrong with its name and size, and refuses to test nothing."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gmn_optim.neurons import NeuronSpaces, chain_spaces
from gmn_optim.nn import GradMetaNet, GradMetaNetConfig, LayerFeatures
from gmn_optim.testing import assert_equivariant

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
    before = torch.get_rng_state()
    assert_equivariant(RIGHT["neurons"], SPACES, in_channels=2)
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
