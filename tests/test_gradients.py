"""Factors recompose to gradients: for all data points together and for each of them."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from gmn_optim.capture import GradientCapture
from gmn_optim.gradients import DecomposedGradient, GradientSet
from tests import reference

SHAPES = {"data points": (6, 1), "positions": (4, 3), "one": (1, 1), "none": (0, 2)}


def draw(shape: str) -> DecomposedGradient:
    """Return random factors for three inputs and two outputs."""
    generator = torch.Generator().manual_seed(0)
    a, g = (torch.randn(*SHAPES[shape], width, dtype=torch.float64, generator=generator) for width in (3, 2))
    return DecomposedGradient(a, g)


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_are_those_of_a_loop_over_rows(shape: str) -> None:
    gradient, (points, positions) = draw(shape), SHAPES[shape]
    weight, bias = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for b in range(points):
        for p in range(positions):
            weight += torch.outer(gradient.backprops[b, p], gradient.activations[b, p])
            bias += gradient.backprops[b, p]
    torch.testing.assert_close(gradient.sum_of_outer_products(), weight, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient.sum_of_backprops(), bias, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", ["data points", "positions", "one"])
def test_per_sample_gradients_add_up_to_the_gradient(shape: str) -> None:
    gradients = GradientSet({"layer": draw(shape)})
    each, together = gradients.per_sample_gradients("layer"), gradients.mean_gradient("layer")
    for name in ("weight", "bias"):
        assert each[name].shape == (SHAPES[shape][0], *together[name].shape)
        torch.testing.assert_close(each[name].sum(0), together[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 3)])
def test_per_sample_gradients_are_those_of_batches_of_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(shape, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, parameters, (x,)).square().sum()

    with GradientCapture(model) as capture:
        loss(dict(model.named_parameters()), x).backward()
    expected = reference.per_sample_gradients(loss, dict(model.named_parameters()), x)
    for name, value in expected.items():
        layer, slot = name.split(".")
        found = capture.gradients().per_sample_gradients(layer)[slot]
        torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-13)


def test_a_recomposition_of_its_own_is_used_for_both() -> None:
    gradient = draw("positions")
    gradients = GradientSet({"layer": gradient}, {"layer": lambda each: {"scale": each.sum_of_backprops().sum()}})
    torch.testing.assert_close(gradients.mean_gradient("layer")["scale"], gradient.backprops.sum())
    torch.testing.assert_close(gradients.per_sample_gradients("layer")["scale"], gradient.backprops.sum((1, 2)))


def test_a_gradient_set_is_a_dictionary_of_its_own() -> None:
    factors, ways = {"layer": draw("one")}, {"layer": lambda each: {}}
    gradients = GradientSet(factors, ways)
    factors.clear()
    ways.clear()
    assert list(gradients) == ["layer"] and gradients.mean_gradient("layer") == {}
    with pytest.raises(KeyError):
        gradients.mean_gradient("other")
