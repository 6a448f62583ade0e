"""What every layer kind that an adapter serves must pass: its factors are autograd's gradient, in float64."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from gmn_optim.capture import GradientCapture, capture_gradients
from gmn_optim.capture.adapters import require_adapter
from gmn_optim.capture.rows import RowChoice
from gmn_optim.gradients import DecomposedGradient
from gmn_optim.rule import Segment
from gmn_optim.testing import assert_recomposes
from tests.tables import LAYERS, Shape

CASES = [
    pytest.param(kind, variant, shape, id=f"{kind.__name__} {variant} {shape}")
    for kind, case in LAYERS.items()
    for variant in case.variants
    for shape in case.shapes
]
VARIANTS = [
    pytest.param(kind, variant, case.shapes[0], id=f"{kind.__name__} {variant}")
    for kind, case in LAYERS.items()
    for variant in case.variants
]
OF_FEATURES = [case for case in CASES if LAYERS[case.values[0]].draw((1,)).is_floating_point()]
OF_SEVERAL_NEURONS = [
    case for case in CASES if require_adapter(LAYERS[case.values[0]].variants[case.values[1]]()).structure != "diagonal"
]
"""Others scale each neuron by itself: the neurons of their input are those of their output."""

ROWS = 6


def make(kind: type[nn.Module], variant: str, shape: Shape) -> tuple[nn.Module, Tensor]:
    """Return a layer in float64, its parameters random and not zero, and an input."""
    torch.manual_seed(0)
    layer = LAYERS[kind].variants[variant]().double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer, LAYERS[kind].draw(shape)


def captured(layer: nn.Module, x: Tensor, cotangent: Tensor | None = None, rows: int | None = None) -> GradientCapture:
    """Return what one backward pass of a linear or, without weights of its output, of a square loss leaves."""
    layer.zero_grad()
    with GradientCapture(layer, rows=rows) as capture:
        output = layer(x)
        (output.square() if cotangent is None else output * cotangent).sum().backward()
    return capture


@pytest.mark.parametrize(("kind", "variant", "shape"), CASES)
def test_it_recomposes(kind: type[nn.Module], variant: str, shape: Shape) -> None:
    assert_recomposes(*make(kind, variant, shape))


@pytest.mark.parametrize(("kind", "variant", "shape"), OF_FEATURES)
def test_it_recomposes_behind_another_layer(kind: type[nn.Module], variant: str, shape: Shape) -> None:
    layer, x = make(kind, variant, shape)
    before = nn.Linear(x.shape[-1], x.shape[-1]).double()
    assert_recomposes(nn.Sequential(before, nn.Tanh(), layer), x)


@pytest.mark.parametrize(("kind", "variant", "shape"), CASES)
def test_its_factors_have_three_axes_and_are_explained(kind: type[nn.Module], variant: str, shape: Shape) -> None:
    layer, x = make(kind, variant, shape)
    capture, adapter = captured(layer, x), require_adapter(layer)
    activations, backprops = capture.gradients()[""]
    assert activations.dim() == backprops.dim() == 3 and activations.shape[:2] == backprops.shape[:2]
    assert (activations.shape[2], backprops.shape[2]) == adapter.widths(layer) == adapter.spec(layer)[:2]
    verdict = capture.verify()[""]
    assert verdict.explained and verdict.scale == pytest.approx(1.0, rel=1e-9) and not verdict.vanishing


@pytest.mark.parametrize(("kind", "variant", "shape"), CASES)
def test_a_gradient_that_is_not_its_own_is_not_explained(kind: type[nn.Module], variant: str, shape: Shape) -> None:
    layer, x = make(kind, variant, shape)
    capture = captured(layer, x)
    weight = getattr(layer, require_adapter(layer).parameter_names[0])
    weight.grad.flatten()[0].add_(weight.grad.norm() / 10)
    assert not capture.verify()[""].explained


@pytest.mark.parametrize(("kind", "variant", "shape"), CASES)
def test_hooks_and_the_functional_front_end_see_the_same(kind: type[nn.Module], variant: str, shape: Shape) -> None:
    layer, x = make(kind, variant, shape)
    expected = captured(layer, x).gradients()

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(layer, parameters, x).square().sum()

    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    try:
        torch.func.grad(loss)(parameters)
    except RuntimeError:
        pytest.skip("torch.func takes no gradient through running statistics")
    found = capture_gradients(layer, loss, parameters)
    torch.testing.assert_close(found.factors[""], expected[""], rtol=1e-12, atol=1e-12)
    for name, gradient in found.factors.mean_gradient("").items():
        torch.testing.assert_close(gradient, found.gradients[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("kind", "variant", "shape"), CASES)
def test_a_budget_bounds_the_rows_that_are_kept_and_they_are_still_explained(
    kind: type[nn.Module], variant: str, shape: Shape
) -> None:
    layer, x = make(kind, variant, shape)
    every = captured(layer, x).gradients()[""].backprops.shape[:2].numel()
    capture = captured(layer, x, rows=ROWS)
    factors, verdict = capture.gradients()[""], capture.verify()[""]
    assert min(every, ROWS) / 2 <= factors.backprops.shape[:2].numel() <= ROWS
    assert factors.activations.shape[:2] == factors.backprops.shape[:2]
    assert verdict.explained and verdict.scale == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize(("kind", "variant", "shape"), CASES)
def test_kept_rows_are_those_of_all_factors(kind: type[nn.Module], variant: str, shape: Shape) -> None:
    layer, x = make(kind, variant, shape)
    adapter, output_gradient = require_adapter(layer), torch.randn_like(layer(x))
    points, positions = adapter.rows_of(layer, x, output_gradient)
    choice = RowChoice(torch.arange(points)[1::2], torch.arange(positions)[::2], 3.0)
    choice = choice._replace(points=torch.tensor([points - 1]) if points < 2 else choice.points)
    found = adapter.decompose(layer, x, output_gradient, choice)
    activations, backprops = adapter.decompose(layer, x, output_gradient)
    assert backprops.shape[:2] == (points, positions)
    rows = (choice.points[:, None], choice.positions[None])
    torch.testing.assert_close(found.activations, activations[rows], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.backprops, 3 * backprops[rows], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "variant", "shape"), VARIANTS)
def test_the_same_rows_are_kept_whatever_the_order_of_the_data_points(
    kind: type[nn.Module], variant: str, shape: Shape
) -> None:
    layer, x = make(kind, variant, shape)
    cotangent = torch.randn_like(layer(x))
    full = captured(layer, x, cotangent).gradients()[""].backprops
    order = torch.randperm(len(x))
    assert len(full) == len(x) > 1

    def kept(order: Tensor) -> DecomposedGradient:
        factors = captured(layer, x[order], cotangent[order], rows=ROWS).gradients()[""]
        if len(factors.backprops) < len(full):
            return factors  # in the order of rank
        return DecomposedGradient(*(factor[order.argsort()] for factor in factors))

    torch.testing.assert_close(kept(order), kept(torch.arange(len(x))), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "variant", "shape"), VARIANTS)
def test_the_order_in_memory_is_that_of_the_gradient_matrix(kind: type[nn.Module], variant: str, shape: Shape) -> None:
    layer, _ = make(kind, variant, shape)
    adapter = require_adapter(layer)
    slot = adapter.parameter_names[0]
    weight = getattr(layer, slot).detach()
    matrix, spec = adapter.gradient_matrix(layer, weight), adapter.spec(layer)
    sides = {
        "matrix": (spec.outputs, spec.inputs // spec.groups),
        "diagonal": (spec.outputs, 1),
        "table": (spec.rows, spec.outputs),
    }
    assert matrix.shape == sides[spec.structure]
    segment = Segment(slot, tuple(weight.shape), "", adapter.roles()[slot], adapter.weight_order(layer))
    assert torch.equal(segment.flatten(weight), matrix.flatten())


@pytest.mark.parametrize(("kind", "variant", "shape"), OF_SEVERAL_NEURONS)
def test_each_factor_belongs_to_the_neuron_that_it_is_said_to_belong_to(
    kind: type[nn.Module], variant: str, shape: Shape
) -> None:
    layer, x = make(kind, variant, shape)
    adapter, y = require_adapter(layer), torch.randn_like(layer(x))
    sides = [(y, adapter.backprops, adapter.output_neurons(layer))]
    if adapter.structure == "matrix":
        size = x.shape[adapter.neuron_axis(layer)]
        sides.append((x, adapter.activations, adapter.input_neurons(layer, torch.arange(size))))
    for given, factor, owners in sides:
        axis = adapter.neuron_axis(layer)
        for neuron in range(given.shape[axis]):
            only = torch.zeros_like(given)
            only.select(axis, neuron).copy_(given.select(axis, neuron))
            assert factor(layer, only).flatten(0, 1).any(0).tolist() == (owners == neuron).tolist()
