"""GradMetaNet commutes with what permutes a network's hidden neurons, and does not see the order of data points."""

import itertools

import pytest
import torch
from torch import nn

from gmn_optim.errors import InvalidArgumentError
from gmn_optim.neurons import LayerPorts, NeuronSpace, NeuronSpaces, chain_spaces
from gmn_optim.nn import GradMetaNet, GradMetaNetConfig
from gmn_optim.testing import assert_equivariant
from tests import reference

SPACES = {
    "unequal widths": chain_spaces([5, 3, 7, 1, 2]),
    "no hidden layer's neurons shared": NeuronSpaces(
        tuple(NeuronSpace(w, "hidden", d) for w, d in ((3, 0), (4, 1), (4, 0), (2, 1))),
        (LayerPorts("a", 0, 1), LayerPorts("b", 2, 3)),
    ),
    "two layers on one space": NeuronSpaces(
        (NeuronSpace(3, "input", 0), NeuronSpace(4, "hidden", 1), NeuronSpace(2, "output", 2)),
        (LayerPorts("a", 0, 1), LayerPorts("b", 1, 2), LayerPorts("c", 1, 1)),
    ),
}
DEPTHS = {"shallow": (1, 0), "usual": (2, 1), "deep": (3, 2)}


def draw(neuron_channels: int = 0, dtype: torch.dtype = torch.float64, **sizes: object) -> GradMetaNet:
    """Return a network whose every weight, heads and biases too, is random and not zero."""
    torch.manual_seed(0)
    network = GradMetaNet(2, neuron_channels, GradMetaNetConfig(**{"width": 12, "out_channels": 5, **sizes}))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.4)
    return network.to(dtype)


@pytest.mark.parametrize("neuron_channels", [0, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wiring", SPACES)
def test_networks_of_all_sizes_are_equivariant(
    wiring: str, dtype: torch.dtype, reduction: str, neuron_channels: int
) -> None:
    for numbers, depth in itertools.product((True, False), DEPTHS.values()):
        set_layers, neuron_layers = depth
        network = draw(
            neuron_channels,
            dtype,
            set_layers=set_layers,
            neuron_layers=neuron_layers,
            reduction=reduction,
            neuron_numbers=numbers,
        )
        assert_equivariant(network, SPACES[wiring], in_channels=2, neuron_channels=neuron_channels, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_embedding_is_equivariant(dtype: torch.dtype) -> None:
    assert_equivariant(draw(3, dtype).embed, chain_spaces([5, 3, 2]), in_channels=2, neuron_channels=3, dtype=dtype)


def test_without_numbers_inputs_and_outputs_of_the_network_are_permutable_too() -> None:
    kinds = ("input", "hidden", "output")
    assert_equivariant(draw(neuron_numbers=False), chain_spaces([5, 3, 2]), in_channels=2, kinds=kinds)


@pytest.mark.parametrize("kind", ["input", "output"])
def test_with_numbers_fixed_neurons_are_not_permutable(kind: str) -> None:
    with pytest.raises(AssertionError, match="does not follow permutations of neurons"):
        assert_equivariant(draw(neuron_numbers=True), chain_spaces([5, 3, 2]), in_channels=2, kinds=(kind,))


def test_an_untouched_initialisation_is_equivariant() -> None:
    torch.manual_seed(0)
    assert_equivariant(GradMetaNet(2).double(), chain_spaces([5, 8, 2]), in_channels=2)


def test_it_equals_its_layers_one_after_the_other() -> None:
    spaces, network = chain_spaces([2, 3, 2]), draw(3)
    sets, neurons = torch.randn(4, 7, 2, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    code = network.encoding(spaces, torch.float64)
    offset = code @ network.from_code.weight.T + neurons @ network.from_neurons.weight.T
    hidden = (reference.interactions_across_sets(network.set_layers[0], sets) + offset).relu()
    hidden = reference.interactions_across_sets(network.set_layers[1], hidden).relu()
    hidden = reference.set_pooling(network.pooling, hidden).relu()
    hidden = reference.deep_sets(network.neuron_layers[0], hidden).relu()
    torch.testing.assert_close(network.embed(sets, spaces, neurons), hidden, rtol=1e-12, atol=1e-12)
    for found, expected in zip(
        network(sets, spaces, neurons), reference.product_layer(network.product, hidden, spaces), strict=True
    ):
        torch.testing.assert_close(found.weight, expected.weight, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.bias, expected.bias, rtol=1e-12, atol=1e-12)


def test_the_code_is_as_if_concatenated_to_every_data_point() -> None:
    spaces, network = chain_spaces([2, 3, 2]), draw(set_layers=1, neuron_layers=0)
    sets = torch.randn(4, 7, 2, dtype=torch.float64)
    # pooled terms of a code that all data points share are the same linear function of it up to pooling over neurons
    code = network.encoding(spaces, torch.float64)
    first = network.set_layers[0]
    own = torch.cat([first.own.weight, network.from_code.weight], dim=1)
    by_concatenation = torch.cat([sets, code.expand(4, -1, -1)], dim=-1) @ own.T + first.own.bias
    pooled_terms = first(sets) - sets @ first.own.weight.T - first.own.bias
    expected = network.pooling((by_concatenation + pooled_terms).relu()).relu()
    torch.testing.assert_close(network.embed(sets, spaces), expected, rtol=1e-12, atol=1e-12)


WRONG = {
    "no width": {"width": 0},
    "no set layers": {"set_layers": 0},
    "negative neuron layers": {"neuron_layers": -1},
    "unknown reduction": {"reduction": "max"},
    "odd code": {"code_channels": 3},
    "negative code": {"code_channels": -2},
    "no output": {"out_channels": 0},
    "a head that is no yes or no": {"scale_head": 1},
}


@pytest.mark.parametrize("fault", WRONG)
def test_sizes_that_make_no_sense_are_refused(fault: str) -> None:
    with pytest.raises(InvalidArgumentError, match="|".join(WRONG[fault])):
        GradMetaNetConfig(**WRONG[fault])
