"""Arms of a comparison: how each optimizer is made, over which step sizes it is tuned, and what it needs."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gmn_optim.errors import InvalidArgumentError
from gmn_optim.registry import Registry


@dataclass(frozen=True)
class OptimizerSet:
    """Optimizers that share a model's parameters between them, and their schedulers, stepped as one.

    Attributes:
        optimizers: Each with parameters of its own.
        schedulers: Stepped once after the optimizers.
        switches: Whether optimizers that keep separate weights for evaluation are told when it comes; otherwise those
            of training are measured.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1)
        >>> both = OptimizerSet([torch.optim.SGD([model.weight], lr=0.1), torch.optim.Adam([model.bias])])
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> both.step()
        >>> both.zero_grad()
        >>> model.bias.grad is None
        True
    """

    optimizers: Sequence[Optimizer]
    schedulers: Sequence[LRScheduler] = ()
    switches: bool = True

    def zero_grad(self) -> None:
        """Reset all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        """Take one step of every optimizer, then of every scheduler."""
        for each in (*self.optimizers, *self.schedulers):
            each.step()

    def set_training(self, training: bool) -> None:
        """Tell optimizers that keep separate weights for evaluation which of the two are wanted."""
        for optimizer in self.optimizers if self.switches else ():
            switch = getattr(optimizer, "train" if training else "eval", None)
            if switch is not None:
                switch()


Factory = Callable[..., Optimizer | OptimizerSet]
"""``(model, lr, total_steps, **options)`` to an optimizer, or several with schedulers."""


@dataclass(frozen=True)
class Setting:
    """One point of an arm's grid.

    Attributes:
        lr: Step size.
        options: Further options by name.

    Example:
        >>> str(Setting(0.03, (("damping", 0.1),)))
        'lr 0.03, damping 0.1'
    """

    lr: float
    options: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        """Return the setting as words."""
        return ", ".join(f"{name} {value:g}" for name, value in (("lr", self.lr), *self.options))


@dataclass(frozen=True)
class Arm:
    """An optimizer in a comparison.

    Attributes:
        name: In tables and on the command line.
        make: Makes the optimizer of a model.
        lrs: Step sizes it is tuned over, ascending; one alone means that it runs untuned.
        options: Further options, each tuned at every step size; one empty mapping for none.
        needs: An importable module and the requirement for pip that brings it, or None.
        remark: What a reader of the tables must know of it.

    Example:
        >>> import torch
        >>> arm = Arm("sgd", lambda model, lr, total_steps: torch.optim.SGD(model.parameters(), lr=lr), lrs=(0.1, 1.0))
        >>> arm.build(nn.Linear(2, 1), Setting(0.1), total_steps=10).optimizers[0].param_groups[0]["lr"]
        0.1
    """

    name: str
    make: Factory
    lrs: tuple[float, ...]
    options: tuple[Mapping[str, float], ...] = ({},)
    needs: tuple[str, str] | None = None
    remark: str = ""

    def __post_init__(self) -> None:
        if not self.lrs or list(self.lrs) != sorted(set(self.lrs)) or self.lrs[0] <= 0 or not self.options:
            raise InvalidArgumentError(
                f"arm {self.name!r} has lrs={self.lrs!r} and options={self.options!r}; expected at least one of each, "
                "step sizes positive and ascending"
            )

    @property
    def missing(self) -> str | None:
        """The requirement for pip that is not met, or None if the arm can run."""
        return self.needs[1] if self.needs is not None and not _is_importable(self.needs[0]) else None

    def settings(self) -> list[Setting]:
        """Return the stated grid."""
        return [Setting(lr, tuple(sorted(each.items()))) for each in self.options for lr in self.lrs]

    def build(self, model: nn.Module, setting: Setting, total_steps: int) -> OptimizerSet:
        """Return the optimizers of a model for a training of ``total_steps`` steps."""
        made = self.make(model, setting.lr, total_steps, **dict(setting.options))
        return made if isinstance(made, OptimizerSet) else OptimizerSet([made])


arms: Registry[Arm] = Registry("arm")
"""Every arm by name; ``Registry`` names near matches of an unknown one."""


def register(
    name: str,
    *,
    lrs: Sequence[float],
    options: Sequence[Mapping[str, float]] = ({},),
    needs: tuple[str, str] | None = None,
    remark: str = "",
) -> Callable[[Factory], Factory]:
    """Return a decorator that enters a factory as an arm.

    Args:
        name: In tables and on the command line.
        lrs: Step sizes it is tuned over, ascending.
        options: Further options, each tuned at every step size.
        needs: An importable module and the requirement for pip that brings it.
        remark: What a reader of the tables must know of it.

    Raises:
        InvalidArgumentError: the name is taken, or the grid makes no sense.

    Example:
        >>> import torch
        >>> @register("example-adagrad", lrs=(0.003, 0.01, 0.03))
        ... def make_adagrad(model, lr, total_steps):
        ...     return torch.optim.Adagrad(model.parameters(), lr=lr)
        >>> arms["example-adagrad"].lrs
        (0.003, 0.01, 0.03)
    """

    def enter(make: Factory) -> Factory:
        arms.register(name)(Arm(name, make, tuple(lrs), tuple(options), needs, remark))
        return make

    return enter


def find_arms(chosen: Sequence[str | Arm]) -> tuple[list[Arm], dict[str, str]]:
    """Return the arms that can run, tuned Adam first, and by name the requirement of each that cannot.

    Raises:
        UnknownNameError: no arm has that name.

    Example:
        >>> found, missing = find_arms(["sgd-momentum"])
        >>> [arm.name for arm in found], missing
        (['adam', 'sgd-momentum'], {})
    """
    found: dict[str, Arm] = {"adam": arms["adam"]}
    for each in chosen:
        arm = arms[each] if isinstance(each, str) else each
        found[arm.name] = arm
    missing = {name: arm.missing for name, arm in found.items() if arm.missing is not None}
    return [arm for name, arm in found.items() if name not in missing], missing


def geometric_grid(first: float, last: float, per_decade: int = 2) -> tuple[float, ...]:
    """Return step sizes from ``first`` to ``last`` at even ratios, rounded to two digits.

    Example:
        >>> geometric_grid(1e-3, 0.1)
        (0.001, 0.0032, 0.01, 0.032, 0.1)
    """
    grid: list[float] = []
    while not grid or grid[-1] < last * 0.99:
        grid.append(round_lr(first * 10 ** (len(grid) / per_decade)))
    return tuple(grid)


def round_lr(lr: Any) -> float:
    """Return a step size to two digits.

    Example:
        >>> round_lr(0.0316227766)
        0.032
    """
    return float(f"{lr:.2g}")


def _is_importable(module: str) -> bool:
    """Return whether a module can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
