"""The product layer is an MLP on concatenated neurons, without ever building the concatenation."""

import pytest
import torch
from torch import Tensor

from gmn_optim.neurons import LayerPorts, NeuronSpace, NeuronSpaces, chain_spaces
from gmn_optim.nn import LayerFeatures, ProductLayer
from gmn_optim.nn.product import FeatureRun
from tests import reference

BRANCHED = NeuronSpaces(
    (NeuronSpace(3, "input", 0), NeuronSpace(4, "hidden", 1), NeuronSpace(2, "output", 2), NeuronSpace(5, "hidden", 0)),
    (LayerPorts("a", 0, 1), LayerPorts("b", 1, 2), LayerPorts("c", 3, 1)),
)
GROUPED = NeuronSpaces(
    (NeuronSpace(6, "input", 0), NeuronSpace(4, "hidden", 1), NeuronSpace(4, "output", 2)),
    (LayerPorts("a", 0, 1, groups=2), LayerPorts("b", 1, 2, groups=4)),
)
SPACES = {
    "chain": chain_spaces([4, 3, 2]),
    "branched": BRANCHED,
    "thin": chain_spaces([1, 1]),
    "grouped": GROUPED,
}

pytestmark = pytest.mark.usefixtures("seeded")


def own_features(spaces: NeuronSpaces, channels: int) -> list[LayerFeatures]:
    """Return random features of the parameters themselves."""
    sides = [
        (spaces.widths[ports.output_space], spaces.widths[ports.input_space] // ports.groups) for ports in spaces.layers
    ]
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


MIXED = NeuronSpaces(
    (
        NeuronSpace(6, "hidden", 0),
        NeuronSpace(4, "hidden", 1),
        NeuronSpace(1, "hidden", 0),
        NeuronSpace(6, "hidden", 1),
        NeuronSpace(3, "output", 2),
    ),
    (
        LayerPorts("plain", 0, 4),
        LayerPorts("grouped", 0, 1, groups=2),
        LayerPorts("depthwise", 3, 0, groups=6),
        LayerPorts("table", 2, 3, structure="table", rows=5),
        LayerPorts("other table", 2, 4, structure="table", rows=2),
        LayerPorts("norm", 3, 3, structure="diagonal"),
        LayerPorts("other norm", 1, 1, structure="diagonal"),
    ),
)
SELECTIONS = {
    "all": {
        "weight": ("plain", "grouped", "depthwise"),
        "table": ("table", "other table"),
        "scale": ("norm", "other norm"),
        "bias": ("plain", "norm", "grouped"),
    },
    "another order": {"weight": ("depthwise", "plain"), "scale": ("other norm",), "bias": ("grouped", "norm")},
    "one weight": {"weight": ("plain",)},
    "one grouped weight": {"weight": ("grouped",)},
    "one depthwise weight": {"weight": ("depthwise",)},
    "one table": {"table": ("table",)},
    "one scale": {"scale": ("norm",), "bias": ()},
    "biases only": {"bias": ("other norm", "plain")},
    "nothing": {},
}


def written_out(runs: list[FeatureRun]) -> Tensor:
    """Return runs of features one behind the other (size, 3), none of them empty."""
    assert all(len(run.features) and run.repeats for run in runs)
    return torch.cat([torch.zeros(0, 3, dtype=torch.float64), *(run.features.repeat(run.repeats, 1) for run in runs)])


@pytest.mark.parametrize("scale_head", [True, False])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_flat_is_the_mlps_element_by_element_one_role_behind_the_other(selection: str, scale_head: bool) -> None:
    layer, neurons = ProductLayer(6, 8, 3, scale_head=scale_head).double(), torch.randn(MIXED.size, 6).double()
    found = written_out(layer.flat(neurons, MIXED, SELECTIONS[selection]))
    expected = reference.product_of_roles(layer, neurons, MIXED, SELECTIONS[selection])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_table_is_one_row_repeated() -> None:
    (run,) = ProductLayer(6, 8, 3).flat(torch.randn(MIXED.size, 6), MIXED, {"table": ("table",)})
    assert run.features.shape == (6, 3) and run.repeats == 5


def test_only_a_head_of_their_own_tells_scales_from_biases() -> None:
    neurons = torch.randn(MIXED.size, 6)
    for scale_head in (True, False):
        layer = ProductLayer(6, 8, 3, scale_head=scale_head)
        scale, bias = layer.flat(neurons, MIXED, {"scale": ("norm",), "bias": ("norm",)})
        assert torch.equal(scale.features, bias.features) != scale_head


@pytest.mark.parametrize("rows", [slice(0, 2), slice(1, 3), slice(2, 3)])
@pytest.mark.parametrize(
    ("role", "name"),
    [
        ("weight", "plain"),
        ("weight", "grouped"),
        ("weight", "depthwise"),
        ("table", "table"),
        ("scale", "norm"),
        ("bias", "plain"),
    ],
)
def test_flat_of_some_rows_is_that_part_of_flat(role: str, name: str, rows: slice) -> None:
    layer, neurons = ProductLayer(6, 8, 3, scale_head=True).double(), torch.randn(MIXED.size, 6).double()
    whole = written_out(layer.flat(neurons, MIXED, {role: (name,)}))
    ports = MIXED.layer(name)
    count = ports.rows if role == "table" else MIXED.widths[ports.output_space]
    found = written_out(layer.flat(neurons, MIXED, {role: (name,)}, rows))
    torch.testing.assert_close(found, whole.unflatten(0, (count, -1))[rows].flatten(0, 1), rtol=1e-12, atol=1e-12)
