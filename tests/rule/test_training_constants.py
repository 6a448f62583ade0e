"""What stays through a training: worked out once, and as if it were worked out at every step."""

import torch
from torch import nn

from gmn_optim import GMNOptimizer
from gmn_optim.rule.nominal import Surroundings
from gmn_optim.rule.training_constants import TrainingConstants


def train(steps: int) -> list[torch.Tensor]:
    """Return the parameters of a small network, one of whose weights is small at first, after some steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))
    with torch.no_grad():
        model[2].weight *= 0.4
    inputs, optimizer = torch.randn(8, 5), GMNOptimizer(model)
    for _ in range(steps):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def test_steps_are_those_of_a_rule_that_works_everything_out(monkeypatch) -> None:
    found = train(30)
    monkeypatch.setattr(TrainingConstants, "once", lambda self, name, make: make())
    assert all(map(torch.equal, found, train(30)))


def test_without_constants_everything_is_worked_out() -> None:
    around, made = Surroundings(None, {}, False), []
    for _ in range(2):
        around.once("name", lambda: made.append(1))
    assert len(made) == 2
