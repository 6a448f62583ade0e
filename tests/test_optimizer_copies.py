"""Copies and pickles of optimizers continue like the original, and neither touches the other."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from gmn_optim import CaptureWarning
from tests.cases import (
    LEARNED,
    SOME,
    WITH_FACTORS,
    assert_equal_states,
    assert_same,
    count_hooks,
    distance,
    mlp,
    optimizer_for,
    snapshot,
    train,
)

COPIERS = {"deepcopy": copy.deepcopy, "pickle": lambda given: pickle.loads(pickle.dumps(given))}


@pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS)
@pytest.mark.parametrize("has_scheduler", [False, True], ids=["plain", "scheduled"])
@pytest.mark.parametrize("arm", SOME)
def test_copies_of_model_and_optimizer_continue_alike(make_model, batches, arm, copier, has_scheduler) -> None:
    model = make_model()
    optimizer = optimizer_for(model, arm, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100) if has_scheduler else None
    train(model, optimizer, batches[:6])
    other, copied = copier((model, optimizer))
    before = snapshot(model)
    train(other, copied, batches[6:])
    assert_same(model, before)
    train(model, optimizer, batches[6:])
    assert_same(other, model)
    assert_equal_states(copied.state_dict(), optimizer.state_dict())
    assert copied.stats().served_share == optimizer.stats().served_share == (arm in LEARNED), scheduler


@pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS)
@pytest.mark.parametrize("arm", SOME)
def test_a_copy_of_the_optimizer_alone_has_a_model_of_its_own(make_model, batches, arm, copier) -> None:
    model = make_model()
    optimizer = optimizer_for(model, arm)
    train(model, optimizer, batches[:3])
    copied = copier(optimizer)
    public = {key for key in vars(optimizer) if not key.startswith("_")}
    assert public <= {key for key in vars(copied) if not key.startswith("_")}
    (group,), (own) = copied.param_groups, list(model.parameters())
    values = [parameter.detach().clone() for parameter in group["params"]]
    assert all(torch.equal(value, parameter) for value, parameter in zip(values, own, strict=True))
    train(model, optimizer, batches[3:])
    assert all(torch.equal(value, parameter) for value, parameter in zip(values, group["params"], strict=True))
    before = snapshot(model)
    for parameter in group["params"]:
        parameter.grad = torch.ones_like(parameter)
    if arm in WITH_FACTORS:
        with pytest.warns(CaptureWarning):
            copied.step()
    else:
        copied.step()
    assert_same(model, before)
    assert all(not torch.equal(value, parameter) for value, parameter in zip(values, group["params"], strict=True))


@pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS)
def test_copying_keeps_hooks_apart(make_model, batches, copier) -> None:
    model = make_model()
    optimizer = optimizer_for(model, "slots")
    train(model, optimizer, batches[:2])
    hooks = count_hooks(model)
    other, copied = copier((model, optimizer))
    copied.close()
    assert count_hooks(model) == hooks
    train(model, optimizer, batches[2:])
    assert optimizer.stats().served_share == 1.0 and distance(other, model) > 0


def test_a_copy_of_a_closed_optimizer_is_closed(make_model) -> None:
    model = make_model()
    optimizer = optimizer_for(model, "slots")
    optimizer.close()
    other, copied = copy.deepcopy((model, optimizer))
    assert count_hooks(other) == 0
    assert {row.because for row in copied.summary().rows} == {"the optimizer is closed"}


def test_generations_of_copies_do_not_gather_hooks(make_model) -> None:
    model = make_model()
    optimizer = optimizer_for(model, "slots")
    hooks = []
    for _ in range(4):
        model, optimizer = copy.deepcopy((model, optimizer))
        hooks.append(count_hooks(model))
    assert hooks[-1] == hooks[0]


class Agent(nn.Module):
    """A network that keeps its optimizers, as agents do; a part of it knows one too."""

    def __init__(self, arm: str, is_closed: bool) -> None:
        super().__init__()
        self.network = mlp()
        self.optimizers = [optimizer_for(self, arm), optimizer_for(self, arm, params=self.network[2].parameters())]
        self.network.optimizer = self.optimizers[0]
        if is_closed:
            self.optimizers[0].close()

    def forward(self, inputs: Tensor) -> Tensor:
        """Return outputs (b, 3)."""
        return self.network(inputs)


@pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS)
@pytest.mark.parametrize("is_closed", [False, True], ids=["open", "closed"])
@pytest.mark.parametrize("start", ["agent", "network", "optimizer"])
def test_a_model_that_keeps_its_optimizers_is_copied_with_them(batches, copier, is_closed, start) -> None:
    torch.manual_seed(0)
    agent = Agent("slots", is_closed)
    train(agent, agent.optimizers[1], batches[:3])
    if start == "agent":
        copied = copier(agent)
    else:  # the copy begins at a part and comes upon the agent by way of the optimizer
        part = copier(agent.network if start == "network" else agent.network.optimizer)
        copied = (part.optimizer if start == "network" else part)._model
    before = snapshot(agent)
    for optimizer in copied.optimizers:
        train(copied, optimizer, batches[3:6])
    assert_same(agent, before)
    for optimizer in agent.optimizers:
        train(agent, optimizer, batches[3:6])
    assert_same(copied, agent)
    assert copied.network.optimizer is copied.optimizers[0] and "__setstate__" not in vars(copied)
    assert [optimizer.stats().served_share for optimizer in copied.optimizers] == [float(not is_closed), 1.0]
    assert count_hooks(copied) == count_hooks(agent)
