"""The equivariant layers are what their formulas say, and nothing about them depends on the order of anything."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gmn_optim.nn import DeepSets, InteractionsAcrossSets, SetPooling
from tests import reference

LAYERS: dict[str, tuple[type[nn.Module], Callable[..., Tensor], tuple[int, ...]]] = {
    "interactions": (InteractionsAcrossSets, reference.interactions_across_sets, (4, 6, 3)),
    "pooling": (SetPooling, reference.set_pooling, (4, 6, 3)),
    "deep sets": (DeepSets, reference.deep_sets, (6, 3)),
}
SIZES = {"usual": (4, 6), "one data point": (1, 6), "one neuron": (4, 1), "one of each": (1, 1)}


pytestmark = pytest.mark.usefixtures("seeded")


def draw(name: str, reduction: str, dtype: torch.dtype) -> nn.Module:
    """Return a layer with random weights."""
    return LAYERS[name][0](3, 5, reduction).to(dtype)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_equals_its_formula_element_by_element(name: str, reduction: str, size: str) -> None:
    layer, (_, slow, shape) = draw(name, reduction, torch.float64), LAYERS[name]
    x = torch.randn(*SIZES[size], 3, dtype=torch.float64)
    x = x if len(shape) == 3 else x[0]
    torch.testing.assert_close(layer(x), slow(layer, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["interactions", "pooling"])
def test_with_mean_pooling_a_repeated_set_is_the_set(name: str) -> None:
    layer, x = draw(name, "mean", torch.float64), torch.randn(4, 6, 3, dtype=torch.float64)
    torch.testing.assert_close(layer(x.repeat(3, 1, 1))[: layer(x).shape[0]], layer(x))
