"""Gradients that several backward passes add up, in all the orders that training loops have."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from gmn_optim import CaptureWarning, GMNOptimizer, GradientCapture
from tests.cases import assert_same, loss_of, snapshot, train
from tests.integrations.checks import assert_served, assert_unserved, falls


def summed(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the loss () as a sum over data points."""
    return loss_of(model, inputs) * len(inputs)


@pytest.mark.parametrize("sizes", [[2, 2, 2, 2], [3, 3, 2], [7, 1]], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_accumulated_factors_are_those_of_the_large_batch(make_model, doubles, sizes, reduction) -> None:
    model, twin, batch = make_model(torch.float64), make_model(torch.float64), doubles[0]
    with GradientCapture(model) as whole, GradientCapture(twin) as parts:
        summed(model, batch).div(len(batch) if reduction == "mean" else 1).backward()
        for micro in batch.split(sizes):
            summed(twin, micro).div(len(batch) if reduction == "mean" else 1).backward()
        verdicts = {**parts.verify(), **whole.verify()}
    assert all(verdict.explained and verdict.scale == pytest.approx(1) for verdict in verdicts.values())
    assert list(parts.gradients()) == list(whole.gradients()) == ["0", "2", "4"]
    for name in whole.gradients():
        torch.testing.assert_close(tuple(parts.gradients()[name]), tuple(whole.gradients()[name]))


def test_uneven_parts_of_a_data_loader_equal_the_large_batches(make_model, doubles) -> None:
    model, twin = make_model(torch.float64), make_model(torch.float64)
    data = torch.cat(doubles)[:44]
    optimizer = GMNOptimizer(model)
    loader = torch.utils.data.DataLoader(data, batch_size=8)  # five of 8 and one of 4
    for number, micro in enumerate(loader, start=1):
        summed(model, micro).backward()
        if number % 4 == 0 or number == len(loader):
            optimizer.step()
            optimizer.zero_grad()
    other = GMNOptimizer(twin)
    for batch in data.split(32):
        other.zero_grad()
        summed(twin, batch).backward()
        other.step()
    assert_same(model, twin, rtol=1e-9, atol=1e-12)
    assert_served(optimizer, 2)


def test_one_graph_may_go_backward_twice(make_model, batches) -> None:
    model = make_model()
    optimizer, losses = GMNOptimizer(model), []
    for batch in batches * 3:
        optimizer.zero_grad()
        outputs = model(batch)
        one, other = outputs[:, :2].square().mean(), (outputs[:, 2] - 1).square().mean()
        one.backward(retain_graph=True)
        other.backward()
        optimizer.step()
        losses.append(one.item() + other.item())
    assert falls(losses)
    assert_served(optimizer, 36)


def passing(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> Callable[[], Tensor]:
    """Return a closure that does the whole passes."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    return closure


def test_a_line_search_may_call_its_closure_many_times(make_model, batches) -> None:
    model, twin = make_model(), make_model()
    optimizer = GMNOptimizer(model)
    for batch in batches:
        closure = passing(model, optimizer, batch)
        tried = [closure().item() for _ in range(3)]
        assert optimizer.step(closure).item() == tried[0] == tried[-1]
    train(twin, GMNOptimizer(twin), batches)
    assert_same(model, twin)
    assert_served(optimizer, len(batches))


def test_it_may_take_turns_with_torch_s_lbfgs(make_model, batches) -> None:
    model = make_model()
    optimizer, other = GMNOptimizer(model), torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    losses = []
    for batch in batches:
        other.step(passing(model, other, batch))  # it knows nothing of the factors, and resets none
        losses.append(optimizer.step(passing(model, optimizer, batch)).item())
    assert falls(losses)
    assert_served(optimizer, len(batches))


def test_each_parameter_may_be_stepped_inside_the_backward_pass(make_model, batches) -> None:
    model = make_model()
    optimizers = {parameter: GMNOptimizer(model, [parameter]) for parameter in model.parameters()}

    def step(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    losses = []
    for batch in batches * 3:
        losses.append(loss_of(model, batch))
        losses[-1].backward()
    assert falls([loss.item() for loss in losses])
    for optimizer in optimizers.values():
        assert_served(optimizer, 36)


def attack_by_grad(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the gradient of the loss with respect to the inputs."""
    return torch.autograd.grad(loss_of(model, inputs), inputs)[0]


def attack_by_backward(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the same from a backward pass that is restricted to the inputs."""
    loss_of(model, inputs).backward(inputs=[inputs])
    return inputs.grad


ATTACKS = {"autograd.grad": attack_by_grad, "backward(inputs=)": attack_by_backward}


def train_against(
    attack: Callable[[nn.Module, Tensor], Tensor], model: nn.Module, optimizer: GMNOptimizer, batches: list[Tensor]
) -> list[float]:
    """Train on examples moved against the model, several micro-batches for each step; return the losses."""
    losses = []
    for start in range(0, len(batches), 2):
        optimizer.zero_grad()
        for batch in batches[start : start + 2]:
            inputs = batch.clone().requires_grad_()
            attacked = (inputs + 0.1 * attack(model, inputs).sign()).detach()
            loss = loss_of(model, attacked)
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
    return losses


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_adversarial_training_is_served(make_model, batches, attack) -> None:
    model = make_model()
    optimizer = GMNOptimizer(model)
    losses = [train_against(attack, model, optimizer, [batch])[0] for batch in batches * 3]
    assert falls(losses)
    assert_served(optimizer, 36)


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_accumulated_adversarial_training_is_served(make_model, batches, attack) -> None:
    model = make_model()
    optimizer = GMNOptimizer(model)
    train_against(attack, model, optimizer, batches)
    assert_served(optimizer, 6)


def test_gradients_put_there_by_hand_are_said_and_left_to_the_nominal_term(make_model, batches) -> None:
    model, twin = make_model(), make_model()
    optimizer, closed = GMNOptimizer(model), GMNOptimizer(twin)
    closed.close()

    def functional_loss(parameters: dict[str, Tensor], batch: Tensor) -> Tensor:
        outputs = functional_call(model, parameters, (batch,))
        return (outputs - torch.linspace(-1.0, 1.0, 3)).square().mean()

    with pytest.warns(CaptureWarning, match="not called through its modules") as caught:
        for batch in batches:
            gradients = grad(functional_loss)(dict(model.named_parameters()), batch)
            for name, parameter in model.named_parameters():
                parameter.grad = gradients[name]
            optimizer.step()
    train(twin, closed, batches)
    assert len(caught) == 1
    assert_same(model, twin, rtol=1e-5, atol=1e-6)
    assert_unserved(optimizer, snapshot(model), "not called through its modules")
