"""The product layer is an MLP on concatenated neurons, without ever building the concatenation."""

import pytest
import torch
from torch import Tensor

from gmn_optim.neurons import LayerPorts, NeuronSpace, NeuronSpaces, chain_spaces
from gmn_optim.nn import LayerFeatures, ProductLayer
from gmn_optim.testing import assert_equivariant
from tests import reference

BRANCHED = NeuronSpaces(
    (NeuronSpace(3, "input", 0), NeuronSpace(4, "hidden", 1), NeuronSpace(2, "output", 2), NeuronSpace(5, "hidden", 0)),
    (LayerPorts("a", 0, 1), LayerPorts("b", 1, 2), LayerPorts("c", 3, 1)),
)
SPACES = {"chain": chain_spaces([4, 3, 2]), "branched": BRANCHED, "thin": chain_spaces([1, 1])}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def own_features(spaces: NeuronSpaces, channels: int) -> list[LayerFeatures]:
    """Return random features of the parameters themselves."""
    sides = [(spaces.widths[ports.output_space], spaces.widths[ports.input_space]) for ports in spaces.layers]
    return [
        LayerFeatures(torch.randn(*side, channels, dtype=torch.float64), torch.randn(side[0], channels).double())
        for side in sides
    ]


@pytest.mark.parametrize("parameter_channels", [0, 2])
@pytest.mark.parametrize("wiring", SPACES)
def test_it_equals_the_mlp_on_concatenations(wiring: str, parameter_channels: int) -> None:
    spaces, layer = SPACES[wiring], ProductLayer(6, 8, 3, parameter_channels).double()
    neurons = torch.randn(spaces.size, 6, dtype=torch.float64)
    own = own_features(spaces, parameter_channels) if parameter_channels else None
    for found, expected in zip(
        layer(neurons, spaces, own), reference.product_layer(layer, neurons, spaces, own), strict=True
    ):
        torch.testing.assert_close(found.weight, expected.weight, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.bias, expected.bias, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wiring", ["chain", "branched"])
def test_it_is_equivariant(wiring: str, dtype: torch.dtype) -> None:
    layer = ProductLayer(6, 8, 3).to(dtype)

    def network(sets: Tensor, spaces: NeuronSpaces, neurons: Tensor | None) -> list[LayerFeatures]:
        return layer(sets.mean(0), spaces)

    assert_equivariant(network, SPACES[wiring], in_channels=6, dtype=dtype)


SELECTIONS = {
    "all": (("a", "b", "c"), ("a", "b", "c")),
    "another order": (("c", "a"), ("b",)),
    "one weight": (("b",), ()),
    "biases only": ((), ("c", "b")),
    "nothing": ((), ()),
}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_flat_is_forward_one_behind_the_other(selection: str) -> None:
    layer, neurons = ProductLayer(6, 8, 3).double(), torch.randn(BRANCHED.size, 6, dtype=torch.float64)
    features = {ports.name: each for ports, each in zip(BRANCHED.layers, layer(neurons, BRANCHED), strict=True)}
    weights, biases = SELECTIONS[selection]
    expected = [torch.cat([features[name].weight.flatten(0, 1) for name in weights])] if weights else []
    expected += [torch.cat([features[name].bias for name in biases])] if biases else []
    found = layer.flat(neurons, BRANCHED, weights, biases)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
