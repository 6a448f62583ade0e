"""Arms of this package: the pretrained optimizer, its nominal term alone, Kronecker Adam, K-FAC."""

from dataclasses import replace

import torch
from torch import nn

from gmn_optim.comparison.arms import OptimizerSet, geometric_grid, register
from gmn_optim.comparison.kfac import KFAC
from gmn_optim.comparison.torch_arms import with_cosine
from gmn_optim.optimizer import GMNOptimizer
from gmn_optim.rule import UpdateRule
from gmn_optim.weights import load_weights

KRONECKER_LRS = geometric_grid(3.2e-4, 3.2e-2)


@register("gmn", lrs=(1.0,), remark="not tuned; chosen on validation tasks of the family default")
def make_gmn(model: nn.Module, lr: float, total_steps: int) -> torch.optim.Optimizer:
    """Return GMNOptimizer with the default weights; its grid is lr=1.0 alone: it runs untuned.

    Measured are averages, as ``eval()`` gives them; so they are of the other arms with averaged steps.
    """
    return GMNOptimizer(model, lr=lr)


@register("gmn-drop-in", lrs=(1.0,), remark="the same without eval() and train(), measured as it is in training")
def make_gmn_drop_in(model: nn.Module, lr: float, total_steps: int) -> OptimizerSet:
    """Return the same, whose parameters in training are measured: the loop of Adam, with nothing added."""
    return OptimizerSet([make_gmn(model, lr, total_steps)], switches=False)


@register("nominal", lrs=geometric_grid(0.1, 10.0))
def make_nominal(model: nn.Module, lr: float, total_steps: int) -> torch.optim.Optimizer:
    """Return the default weights' nominal term, step size and schedule, without what is learned on top of them."""
    return GMNOptimizer(model, weights=nominal_rule(load_weights("default").rule), lr=lr)


@register("kronecker_adam", lrs=KRONECKER_LRS)
def make_kronecker_adam(model: nn.Module, lr: float, total_steps: int) -> torch.optim.Optimizer:
    """Return Adam in the eigenbasis of the Kronecker factors, which needs no meta-training."""
    return GMNOptimizer(model, weights=None, nominal="kronecker_adam", lr=lr)


@register("kronecker_schedule_free", lrs=KRONECKER_LRS)
def make_kronecker_schedule_free(model: nn.Module, lr: float, total_steps: int) -> torch.optim.Optimizer:
    """Return the same with its iterates averaged."""
    return GMNOptimizer(model, weights=None, nominal="kronecker_schedule_free", lr=lr)


@register("kronecker_schedule_free-untuned", lrs=(0.012,), remark="at its default lr, not tuned")
def make_kronecker_schedule_free_untuned(model: nn.Module, lr: float, total_steps: int) -> torch.optim.Optimizer:
    """Return it at its default lr: its grid is that alone."""
    return make_kronecker_schedule_free(model, lr, total_steps)


@register("kronecker_adam-cosine", lrs=KRONECKER_LRS)
def make_kronecker_adam_cosine(model: nn.Module, lr: float, total_steps: int) -> OptimizerSet:
    """Return the same, its step size falling to 0 along a cosine."""
    return with_cosine(OptimizerSet([make_kronecker_adam(model, lr, total_steps)]), total_steps)


@register(
    "kfac",
    lrs=geometric_grid(1e-3, 0.1),
    options=[{"damping": each} for each in (0.01, 0.1)],
    remark="with the empirical Fisher matrix, from the labels of the data; its factors read every position",
)
def make_kfac(model: nn.Module, lr: float, total_steps: int, damping: float) -> torch.optim.Optimizer:
    """Return K-FAC on the captured factors (Martens and Grosse 2015, arXiv 1503.05671).

    What it does not precondition gets Adam's step at a tenth of the lr, so that it is tuned along.
    """
    return KFAC(model, lr=lr, damping=damping, rest_lr=lr / 10)


def nominal_rule(rule: UpdateRule) -> UpdateRule:
    """Return a rule's nominal term with its step size and schedule, without its learned term.

    Example:
        >>> nominal_rule(load_weights("default").rule).config.arm
        'kronecker_schedule_free'
    """
    of_body = {"setpoint": 0.0, "annealing": 0.0, "concentration": 0.0, "epochs": 0.0}
    config = replace(rule.config, body=None, gradmetanet=None, share=1.0, least_size=0.0, **of_body)
    alone = UpdateRule(config).requires_grad_(False)
    known = alone.state_dict()
    alone.load_state_dict({name: value for name, value in rule.state_dict().items() if name in known})
    return alone
