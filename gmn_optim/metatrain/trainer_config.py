"""Settings of a meta-training run, and the schedule of the outer step size."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from gmn_optim.errors import InvalidArgumentError
from gmn_optim.metatrain.estimators import estimators


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Settings of a meta-training run.

    Attributes:
        outer_steps: Meta-gradient steps.
        estimator: ``pes``, ``truncated-es`` or ``backprop``.
        unrolls: Inner trainings side by side.
        truncation: Inner steps for each estimate.
        shortest_horizon: Least length of an inner training; None for the task's horizon.
        longest_horizon: Largest length; lengths are log-uniform between, constant if they are equal.
        staggered: Whether the first trainings start at spread ages.
        sigma: Standard deviation of the perturbations.
        emphasis: A loss at step t of T weighs (emphasis + 1) (t/T)^emphasis.
        lr: Peak step size of the outer Adam.
        final_lr: Step size at the end of the cosine, as a share of the peak.
        warm_up: Outer steps of linear warm-up.
        betas: Of the outer Adam.
        clamp: Each element of the meta-gradient is clamped to this size before Adam sees it.
        seed: Of everything random.
        evaluate_every: Outer steps between two evaluations from scratch.
        evaluation_seeds: Held-out seeds of the inner trainings of an evaluation.
        checkpoint_every: Seconds between two checkpoints.

    Example:
        >>> TrainerConfig(outer_steps=100, estimator="truncated-es").truncation
        50
    """

    outer_steps: int = 3_000
    estimator: str = "pes"
    unrolls: int = 16
    truncation: int = 50
    shortest_horizon: int | None = None
    longest_horizon: int | None = None
    staggered: bool = True
    sigma: float = 0.01
    emphasis: float = 0.0
    lr: float = 1e-3
    final_lr: float = 0.1
    warm_up: int = 100
    betas: tuple[float, float] = (0.9, 0.99)
    clamp: float = 1.0
    seed: int = 0
    evaluate_every: int = 200
    evaluation_seeds: tuple[int, ...] = (10_001, 10_002, 10_003, 10_004, 10_005)
    checkpoint_every: float = 120.0

    def __post_init__(self) -> None:
        positive = ("outer_steps", "unrolls", "truncation", "sigma", "lr", "clamp", "evaluate_every")
        faults = [
            f"{name} = {getattr(self, name)!r} must be positive"
            for name in positive
            if not 0 < getattr(self, name) < math.inf
        ]
        for name in ("shortest_horizon", "longest_horizon"):
            if (value := getattr(self, name)) is not None and value < 1:
                faults.append(f"{name} = {value!r} must be positive")
        if None not in (self.shortest_horizon, self.longest_horizon) and self.shortest_horizon > self.longest_horizon:
            faults.append(f"shortest_horizon = {self.shortest_horizon} must not exceed {self.longest_horizon}")
        if not 0 <= self.emphasis < math.inf:
            faults.append(f"emphasis = {self.emphasis!r} must be 0 or positive")
        if self.warm_up < 0 or not 0 <= self.final_lr <= 1:
            faults.append(f"warm_up = {self.warm_up!r} must be >= 0 and final_lr = {self.final_lr!r} within [0, 1]")
        if faults:
            raise InvalidArgumentError("unusable meta-training settings: " + "; ".join(faults))
        estimators[self.estimator]

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a run records them."""
        return asdict(self)

    def learning_rate(self, step: int) -> float:
        """Return the outer step size at a step, counted from 0: linear warm-up, then a cosine.

        Example:
            >>> config = TrainerConfig(outer_steps=10, warm_up=2, lr=1.0, final_lr=0.0)
            >>> [round(config.learning_rate(step), 2) for step in (0, 1, 2, 6, 10)]
            [0.5, 1.0, 1.0, 0.5, 0.0]
        """
        if step < self.warm_up:
            return self.lr * (step + 1) / self.warm_up
        share = (step - self.warm_up) / max(self.outer_steps - self.warm_up, 1)
        return self.lr * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0))))
