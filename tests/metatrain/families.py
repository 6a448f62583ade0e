"""A family of tiny tasks for tests, and a program that meta-trains on it: ``torchrun families.py FOLDER STEPS``."""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from gmn_optim.metatrain import FamilyConfig, FamilyTrainer
from gmn_optim.metatrain.processes import Processes, join_processes
from gmn_optim.metatrain.runs import build_rule
from gmn_optim.nn import GradMetaNetConfig
from gmn_optim.rule import RuleConfig
from gmn_optim.tasks import AbstractTask, AbstractTaskFamily
from gmn_optim.tasks.base import Batch, Parameters
from gmn_optim.tasks.quadratic import QuadraticTask

RULE = RuleConfig(nominal="adam", width=4, depth=1, data_points=3, gradmetanet=GradMetaNetConfig(width=4, set_layers=1))
SETTINGS = {
    "outer_steps": 10,
    "unrolls": 4,
    "slots": 3,
    "slots_per_step": 2,
    "truncation": 5,
    "held_out_every": 0,
    "shortest_horizon": 10,
    "longest_horizon": 30,
    "warm_up": 2,
    "evaluate_every": 5,
    "checkpoint_every": 1e9,
}


class TinyMLPTask(AbstractTask):
    """Regression of the inputs' sum by an MLP with one hidden layer."""

    horizon, loss_limit, loss_floor = 20, 100.0, 1e-3

    def __init__(self, hidden: int) -> None:
        self.name = f"mlp-{hidden}"
        self.module = nn.Sequential(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 1))

    def init_parameters(self, generator: torch.Generator) -> Parameters:
        shapes = {name: parameter.shape for name, parameter in self.module.named_parameters()}
        return {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    def sample_batch(self, generator: torch.Generator, shape: tuple[int, ...] = ()) -> Batch:
        return (torch.randn((*shape, 4, 3), generator=generator),)

    def loss(self, parameters: Parameters, batch: Batch) -> Tensor:
        outputs = torch.func.functional_call(self.module, parameters, batch)
        return (outputs - batch[0].sum(-1, keepdim=True)).square().mean()


class TinyFamily(AbstractTaskFamily):
    """Quadratics of 2 to 6 coordinates and MLPs of as many hidden neurons; ``failing`` sizes raise an error."""

    validation = test = ("quadratic",)

    def __init__(self, failing: tuple[int, ...] = ()) -> None:
        self.failing = failing

    def sample(self, generator: torch.Generator) -> AbstractTask:
        size = int(torch.randint(2, 7, (), generator=generator))
        if size in self.failing:
            raise ArithmeticError(f"no task of size {size}")
        if torch.rand((), generator=generator) < 0.5:
            return TinyMLPTask(size)
        task = QuadraticTask(size=size)
        task.name, task.loss_floor = f"quadratic-{size}", 1e-3
        return task


def make_trainer(folder: Path, processes: Processes | None = None, failing=(), rule=RULE, **changes) -> FamilyTrainer:
    config = FamilyConfig(**{**SETTINGS, **changes})
    description = {"family": "tiny", "rule": rule.to_dict()}
    return FamilyTrainer(TinyFamily(failing), build_rule(rule, seed=0), config, folder, description, processes)


if __name__ == "__main__":
    with join_processes() as joined:
        failing = tuple(int(size) for size in sys.argv[3:])
        make_trainer(Path(sys.argv[1]), joined, failing).run(until=int(sys.argv[2]), progress=False)
