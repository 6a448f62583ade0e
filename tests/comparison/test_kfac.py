import pytest
import torch
from torch import nn

from gmn_optim import GradientCapture
from gmn_optim.comparison.kfac import KFAC, KroneckerFactors, kronecker_factors
from gmn_optim.errors import InvalidArgumentError


def dense_direction(factors, damping, gradient):
    """Solve with the whole matrix (G + dg I) x (A + da I), rows of the gradient (o, i) one after the other."""
    balance = (factors.inputs.trace() / len(factors.inputs)) / (factors.outputs.trace() / len(factors.outputs))
    a = factors.inputs + (damping * balance).sqrt() * torch.eye(len(factors.inputs), dtype=torch.float64)
    g = factors.outputs + (damping / balance).sqrt() * torch.eye(len(factors.outputs), dtype=torch.float64)
    return torch.linalg.solve(torch.kron(g, a), gradient.flatten()).view_as(gradient)


def slow_factors(inputs, outputs_gradient):
    """A and G of a linear layer, data point by data point, from inputs (b, i) and backprops (b, o) of a mean loss."""
    count = len(inputs)
    extended = torch.cat([inputs, torch.ones(count, 1, dtype=inputs.dtype)], 1)
    a = sum(torch.outer(x, x) for x in extended) / count
    g = sum(torch.outer(count * y, count * y) for y in outputs_gradient) / count
    return KroneckerFactors(a, g)


def test_a_linear_layer_is_preconditioned_by_the_dense_inverse():
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, dtype=torch.float64)
    model, inputs = nn.Sequential(layer), torch.randn(6, 4, dtype=torch.float64)
    optimizer = KFAC(model, lr=0.1, damping=0.05, kl_clip=None)
    before = torch.cat([layer.weight, layer.bias[:, None]], 1).detach().clone()
    outputs = model(inputs)
    outputs.retain_grad()
    outputs.square().sum(1).mean().backward()
    gradient = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
    expected = before - 0.1 * dense_direction(slow_factors(inputs, outputs.grad), 0.05, gradient)
    optimizer.step()
    assert torch.allclose(torch.cat([layer.weight, layer.bias[:, None]], 1), expected, rtol=1e-10, atol=1e-12)


def test_a_convolution_is_preconditioned_by_the_dense_inverse():
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, padding=1, bias=False, dtype=torch.float64)
    model, inputs = nn.Sequential(layer), torch.randn(4, 2, 5, 5, dtype=torch.float64)
    optimizer = KFAC(model, lr=0.1, damping=0.05, kl_clip=None)
    before = layer.weight.detach().clone()
    outputs = model(inputs)
    outputs.retain_grad()
    outputs.square().sum((1, 2, 3)).mean().backward()
    patches = nn.functional.unfold(inputs, 3, padding=1).mT.reshape(-1, 18)
    backprops = outputs.grad.flatten(2).mT.reshape(-1, 3)
    factors = KroneckerFactors(patches.mT @ patches / len(patches), 4 * backprops.mT @ backprops)
    expected = before - 0.1 * dense_direction(factors, 0.05, layer.weight.grad.flatten(1)).view_as(before)
    optimizer.step()
    assert torch.allclose(layer.weight, expected, rtol=1e-10, atol=1e-12)


def test_factors_are_exact_for_one_data_point():
    """With one data point the empirical Fisher matrix is a Kronecker product."""
    layer = nn.Linear(3, 2, dtype=torch.float64)
    with GradientCapture(layer) as capture:
        layer(torch.randn(1, 3, dtype=torch.float64)).square().sum().backward()
        (gradient,) = capture.gradients().values()
    a, g = kronecker_factors(gradient, has_bias=True)
    flat = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1).flatten()
    assert torch.allclose(torch.kron(g, a), torch.outer(flat, flat))


def test_factors_are_moving_averages_that_are_inverted_now_and_then():
    torch.manual_seed(0)
    model = nn.Linear(3, 2, dtype=torch.float64)
    optimizer, first = KFAC(model, decay=0.9, every=2), None
    seen, inverses = [], []
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 3, dtype=torch.float64)).square().mean().backward()
        (gradient,) = optimizer._capture.gradients().values()
        seen.append(kronecker_factors(gradient, has_bias=True).inputs)
        optimizer.step()
        (inverse,) = optimizer._inverses.values()
        inverses.append(inverse.inputs)
    (factors,) = optimizer._factors.values()
    first = 0.9 * seen[0] + 0.1 * seen[1]
    assert torch.allclose(factors.inputs, 0.9 * first + 0.1 * seen[2])
    assert torch.equal(inverses[0], inverses[1]) and not torch.equal(inverses[1], inverses[2])


def test_the_step_is_bounded():
    torch.manual_seed(0)
    model = nn.Linear(3, 2, dtype=torch.float64)
    optimizer = KFAC(model, lr=10.0, kl_clip=1e-3)
    model(torch.randn(5, 3, dtype=torch.float64)).square().mean().backward()
    start = {name: each.detach().clone() for name, each in model.named_parameters()}
    gradients = {name: each.grad.clone() for name, each in model.named_parameters()}
    optimizer._update_factors()
    change = 100 * sum((v * p.grad).sum() for p, v in optimizer.preconditioned())
    optimizer.step()
    moved = sum(((start[name] - each) * gradients[name]).sum() for name, each in model.named_parameters())
    assert moved.item() == pytest.approx((10.0 * (1e-3 / change) ** 0.5 * change / 100).item())


def test_what_is_not_preconditioned_takes_adams_steps():
    model = nn.Sequential(nn.Embedding(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    optimizer = KFAC(model, rest_lr=0.01)
    before = model[1].bias.detach().clone()
    model(torch.tensor([0, 1])).square().mean().backward()
    moves = model[1].bias.grad.sign()
    optimizer.step()
    assert list(optimizer._layers) == ["2"]
    assert torch.allclose(before - model[1].bias, 0.01 * moves, atol=1e-5)


def test_a_tied_weight_is_left_to_adam():
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 3), nn.Linear(3, 4, bias=False))
    model[2].weight = model[0].weight
    optimizer = KFAC(model)
    model(torch.tensor([0, 1])).square().mean().backward()
    optimizer.step()
    assert list(optimizer._layers) == ["1"]
    assert model[0].weight in optimizer._rest.state


def test_numbers_that_make_no_sense_are_refused():
    with pytest.raises(InvalidArgumentError, match="positive damping"):
        KFAC(nn.Linear(1, 1), damping=0.0)
