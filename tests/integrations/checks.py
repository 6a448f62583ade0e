"""What tests of training loops require of an optimizer afterwards, whoever wrote the loop."""

import copy
import math
from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import nn

from gmn_optim import GMNOptimizer, load_weights
from gmn_optim.rule import RuleConfig

EVERY_LAYER = "fashion-mnist-mlp.adam-gmn"
"""Weights that serve every kind of layer."""

Loop = Callable[[nn.Module, GMNOptimizer], object]
"""Trains a model with an optimizer."""


def default_config() -> RuleConfig:
    """Return the configuration of the rule of ``GMNOptimizer(model)`` in these tests."""
    return load_weights(EVERY_LAYER).rule.config


def assert_served(optimizer: GMNOptimizer, steps: int, missed: Collection[str] = ()) -> None:
    """Require that GradMetaNet moved every ``nn.Linear``, and that report and summary say so.

    Layers of other kinds may be served or not.

    Args:
        optimizer: After training.
        steps: How many steps it took.
        missed: Names of parameters that are exempt.
    """
    report, arm = optimizer.stats(), default_config().arm
    assert (report.steps, report.skipped) == (steps, 0)
    every = optimizer.summary().rows
    exempt = {row.parameter for row in every if "zero up to rounding" in row.because} | set(missed)
    rows = [row for row in every if row.layer == "Linear" and row.parameter not in exempt]
    assert rows, "no linear layer to look at"
    for row in rows:
        newest = report.parameters[row.parameter]
        assert row.updated_by == arm and "explain" in row.because, row
        assert newest.update_rms > 0 and newest.guarded < steps, (row.parameter, newest)
    share = sum(math.prod(row.shape) for row in rows) / sum(math.prod(row.shape) for row in every)
    assert report.served_share >= share - 1e-9


def assert_unserved(optimizer: GMNOptimizer, names: Iterable[str], words: str) -> None:
    """Require that the nominal term alone moved the named parameters, and that the summary says why.

    Args:
        optimizer: After training.
        names: Full names of parameters.
        words: What each reason holds.
    """
    rows, nominal = {row.parameter: row for row in optimizer.summary().rows}, default_config().nominal
    for name in names:
        assert rows[name].updated_by == nominal and words in rows[name].because, rows[name]
        assert optimizer.stats().parameters[name].update_rms > 0, name


def train_copy(model: nn.Module, loop: Loop) -> nn.Module:
    """Return a copy of a model, trained by a loop with ``GMNOptimizer(copy)``."""
    twin = copy.deepcopy(model)
    loop(twin, GMNOptimizer(twin))
    return twin


def train_copy_nominally(model: nn.Module, loop: Loop) -> nn.Module:
    """Return a copy of a model, trained by a loop with the nominal term alone."""
    twin = copy.deepcopy(model)
    optimizer = GMNOptimizer(twin)
    optimizer.close()
    loop(twin, optimizer)
    return twin


def falls(losses: Sequence[float], to: float = 0.8) -> bool:
    """Return whether the last fifth of some losses is, on average, below a share of the first fifth."""
    values = torch.tensor(losses, dtype=torch.float64)
    fifth = max(1, len(values) // 5)
    return bool(values[-fifth:].mean() < to * values[:fifth].mean())
