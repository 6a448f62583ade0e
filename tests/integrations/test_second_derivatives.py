"""Losses that hold derivatives of the model (``create_graph=True``): named, left to the nominal term, and trained."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from gmn_optim import CaptureWarning, GMNOptimizer
from tests.cases import assert_same, distance, snapshot
from tests.integrations.checks import Loop, assert_served, assert_unserved, falls, train_copy_nominally

WORDS = "second derivatives"


def tanh_network(inputs: int = 1, outputs: int = 1) -> nn.Sequential:
    """Return a smooth network, the same at every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, outputs))


def derivative(of: Tensor, by: Tensor) -> Tensor:
    """Return the derivative of each value by its own input, with a graph of its own."""
    return torch.autograd.grad(of.sum(), by, create_graph=True)[0]


def residual(model: nn.Module) -> Tensor:
    """Return the loss () of ``u'' = -pi^2 sin(pi x)`` with ``u = 0`` at both ends."""
    x = torch.linspace(-1, 1, 33)[:, None].requires_grad_()
    second = derivative(derivative(model(x), x), x)
    ends = model(torch.tensor([[-1.0], [1.0]]))
    return (second + torch.pi**2 * torch.sin(torch.pi * x)).square().mean() / 100 + ends.square().mean()


def solving(steps: int, reset: str) -> Loop:
    """Return a loop that solves the differential equation, and resets gradients at one of two places."""

    def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        losses = []
        for _ in range(steps):
            if reset == "first":
                optimizer.zero_grad()
            loss = residual(model)
            if reset == "last":
                optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    return loop


@pytest.mark.parametrize("reset", ["first", "last"])
def test_a_physics_informed_network_is_warned_of_once_and_learns(reset) -> None:
    model = tanh_network()
    loop = solving(80, reset)
    nominal, optimizer = train_copy_nominally(model, loop), GMNOptimizer(model)
    with pytest.warns(CaptureWarning) as caught:
        losses = loop(model, optimizer)
    assert len(caught) == 1 and falls(losses, to=0.1)
    assert_unserved(optimizer, snapshot(model), "")
    assert_same(model, nominal, rtol=1e-4, atol=1e-5)
    x = torch.linspace(-1, 1, 33)[:, None]
    assert (model(x) - torch.sin(torch.pi * x)).abs().max() < 0.2


@pytest.mark.parametrize("reset", ["first", "last"])
def test_second_derivatives_are_named_as_the_cause(reset) -> None:
    model = tanh_network()
    optimizer = GMNOptimizer(model)
    with pytest.warns(CaptureWarning):
        solving(2, reset)(model, optimizer)
    assert_unserved(optimizer, snapshot(model), WORDS)


def test_a_solution_may_be_polished_on_data_with_factors() -> None:
    model = tanh_network()
    optimizer = GMNOptimizer(model)
    with pytest.warns(CaptureWarning):
        solving(20, "first")(model, optimizer)
    x = torch.linspace(-1, 1, 33)[:, None]
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - torch.sin(torch.pi * x)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert falls(losses)
    assert_served(optimizer, 80)


def slopes(critic: nn.Module, inputs: Tensor) -> Tensor:
    """Return the norm (b) of the critic's derivative by each of its inputs (b, i)."""
    inputs = inputs.detach().requires_grad_()
    return derivative(critic(inputs), inputs).norm(dim=1)


def judging(steps: int, every: int) -> Loop:
    """Return a loop that trains a critic; every so many steps its loss holds a penalty on its slopes."""

    def loop(critic: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        generator, losses = torch.Generator().manual_seed(1), []
        for number in range(steps):
            real, fake = torch.randn(2, 16, 5, generator=generator) + torch.tensor([1.0, 0.0])[:, None, None]
            optimizer.zero_grad()
            loss = nn.functional.softplus(critic(fake)).mean() + nn.functional.softplus(-critic(real)).mean()
            if number % every == 0:
                (loss + 0.1 * (slopes(critic, 0.5 * (real + fake)) - 1).square().mean()).backward()
            else:
                loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    return loop


def test_a_gradient_penalty_is_warned_of_once_and_trained_by_the_nominal_term() -> None:
    critic, loop = tanh_network(inputs=5), judging(60, every=1)
    nominal, optimizer = train_copy_nominally(critic, loop), GMNOptimizer(critic)
    with pytest.warns(CaptureWarning, match=WORDS) as caught:
        losses = loop(critic, optimizer)
    assert len(caught) == 1 and falls(losses)
    assert_unserved(optimizer, [name for name in snapshot(critic) if name != "4.bias"], WORDS)
    assert_same(critic, nominal, rtol=1e-4, atol=1e-5)


def test_steps_between_lazy_penalties_are_served() -> None:
    critic, loop = tanh_network(inputs=5), judging(60, every=4)
    nominal, optimizer = train_copy_nominally(critic, loop), GMNOptimizer(critic)
    with pytest.warns(CaptureWarning, match=WORDS) as caught:
        losses = loop(critic, optimizer)
    assert len(caught) == 1 and falls(losses)
    assert_served(optimizer, 60)  # the newest step had no penalty
    assert distance(critic, nominal) > 1e-4


def test_a_penalty_on_the_critic_leaves_the_generator_served() -> None:
    critic, generator = tanh_network(inputs=5), tanh_network(inputs=4, outputs=5)
    of_critic, of_generator = GMNOptimizer(critic), GMNOptimizer(generator)
    gaps, noise = [], torch.Generator().manual_seed(1)
    with pytest.warns(CaptureWarning, match=WORDS) as caught:
        for _ in range(60):
            real = torch.randn(16, 5, generator=noise) * 0.1 + 1.0
            fake = generator(torch.randn(16, 4, generator=noise))
            of_critic.zero_grad()
            loss = critic(fake.detach()).mean() - critic(real).mean()
            (loss + (slopes(critic, 0.5 * (real + fake)) - 1).square().mean()).backward()
            of_critic.step()
            of_generator.zero_grad()
            (-critic(fake).mean()).backward()
            of_generator.step()
            gaps.append((fake.mean() - real.mean()).abs().item())
    assert len(caught) == 1 and min(gaps) < 0.6 * gaps[0]
    assert_served(of_generator, 60)
    assert of_critic.stats().steps == 60


def test_meta_learning_through_an_inner_step_is_named_and_learns() -> None:
    model = tanh_network()
    optimizer, losses, draws = GMNOptimizer(model), [], torch.Generator().manual_seed(1)
    x = torch.linspace(-1, 1, 16)[:, None]
    with pytest.warns(CaptureWarning) as caught:
        for _ in range(60):
            targets = torch.sin(torch.pi * x) * (1 + torch.rand((), generator=draws))
            optimizer.zero_grad()
            parameters = dict(model.named_parameters())
            inner = torch.autograd.grad(
                (model(x) - targets).square().mean(), list(parameters.values()), create_graph=True
            )
            fast = {name: value - 0.1 * step for (name, value), step in zip(parameters.items(), inner, strict=True)}
            loss = (functional_call(model, fast, (x,)) - targets).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert len(caught) == 1 and falls(losses)
    assert_unserved(optimizer, snapshot(model), "")
