"""The outer loop: estimate a meta-gradient, take a step of Adam, log, evaluate, checkpoint."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from gmn_optim.errors import InvalidArgumentError
from gmn_optim.metatrain.checkpoint import load_checkpoint, save_checkpoint
from gmn_optim.metatrain.estimators import AbstractGradientEstimator, Horizons, MetaGradient, MetaShape, estimators
from gmn_optim.metatrain.evaluation import Curves, evaluate
from gmn_optim.metatrain.unroll import Unroll

CHECKPOINT = "checkpoint.safetensors"
LOG = "log.jsonl"


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


class MetaTrainer:
    """Meta-trains the rule of an unroll, in a folder from which a killed run goes on bit for bit.

    The folder holds the newest checkpoint, a JSON-lines log, and the meta-parameters at every evaluation.

    Args:
        unroll: Task and rule; meta-training starts from the rule's own meta-parameters.
        config: Settings.
        folder: Made if it does not exist. A checkpoint in it is continued; its settings must be the same.
        description: Further facts that must not change between parts of a run (task name, rule).

    Raises:
        CheckpointError: the folder holds a checkpoint of other settings, or a damaged one.

    Example:
        >>> import tempfile
        >>> from gmn_optim.rule import RuleConfig, UpdateRule
        >>> from gmn_optim.tasks.quadratic import QuadraticTask
        >>> unroll = Unroll(QuadraticTask(), UpdateRule(RuleConfig(body=None)))
        >>> config = TrainerConfig(outer_steps=2, unrolls=2, truncation=5, evaluation_seeds=(1,))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     MetaTrainer(unroll, config, folder).run(progress=False).shape
        torch.Size([2])
    """

    def __init__(
        self, unroll: Unroll, config: TrainerConfig, folder: str | Path, description: dict[str, Any] | None = None
    ) -> None:
        self.unroll = unroll
        self.config = config
        self.folder = Path(folder)
        self.shape = MetaShape(unroll.meta_parameters())
        self.estimator = _make_estimator(unroll, self.shape, config)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.meta = self.shape.flatten(unroll.meta_parameters()).clone()
        self.optimizer = torch.optim.Adam([self.meta], lr=config.lr, betas=config.betas)
        self.state = self.estimator.init(self.generator)
        self.step_number = 0
        self.seconds = 0.0
        self.settings = {"trainer": asdict(config), **(description or {})}
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / CHECKPOINT).exists():
            self._resume()

    def run(self, until: int | None = None, progress: bool = True) -> Tensor:
        """Train up to outer step ``until`` (all by default) and return the flat meta-parameters (m)."""
        until = self.config.outer_steps if until is None else min(until, self.config.outer_steps)
        bar = tqdm(total=until, initial=self.step_number, desc="meta-training", unit="step", disable=not progress)
        saved = time.monotonic()
        with torch.no_grad(), bar:
            while self.step_number < until:
                if self.step_number == 0:
                    self._evaluate(bar)
                started = time.monotonic()
                loss = self.step()
                self.seconds += time.monotonic() - started
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update()
                evaluated = self.step_number % self.config.evaluate_every == 0 or self.step_number == until
                if evaluated:
                    self._evaluate(bar)
                if evaluated or time.monotonic() - saved > self.config.checkpoint_every:
                    self.save()
                    saved = time.monotonic()
        return self.meta

    def step(self) -> float:
        """Take one outer step and return the mean meta-loss of its unrolls."""
        estimate, self.state = self.estimator.estimate(self.meta, self.state, self.generator)
        lr = self.config.learning_rate(self.step_number)
        self.optimizer.param_groups[0]["lr"] = lr
        self.meta.grad = estimate.gradient.nan_to_num(0.0).clamp(-self.config.clamp, self.config.clamp)
        self.optimizer.step()
        self.step_number += 1
        self._log_step(estimate, lr)
        return estimate.loss.item()

    def evaluate(self, progress: bool = False) -> Curves:
        """Train from scratch on the held-out seeds with the present meta-parameters; validation split."""
        meta = self.shape.unflatten(self.meta)
        return evaluate(self.unroll, meta, self.config.evaluation_seeds, progress=progress)

    def save(self) -> None:
        """Write the checkpoint, replacing the old one in one move."""
        moments = self.optimizer.state.get(self.meta, {})
        tree = {"meta": self.meta, "generator": self.generator.get_state(), "state": self.state, "adam": dict(moments)}
        facts = {"settings": self.settings, "step": self.step_number, "seconds": self.seconds}
        save_checkpoint(self.folder / CHECKPOINT, tree, facts)

    def _resume(self) -> None:
        """Continue from the checkpoint in the folder, dropping log lines that are newer than it."""
        adam = {"step": torch.zeros(()), "exp_avg": self.meta, "exp_avg_sq": self.meta}
        like = {"meta": self.meta, "generator": self.generator.get_state(), "state": self.state, "adam": adam}
        tree, facts = load_checkpoint(self.folder / CHECKPOINT, like, self.settings)
        self.meta.copy_(tree["meta"])
        self.optimizer.state[self.meta] = tree["adam"]
        self.generator.set_state(tree["generator"])
        self.state = tree["state"]
        self.step_number, self.seconds = facts["step"], facts["seconds"]
        _keep_lines_until(self.folder / LOG, self.step_number)

    def _evaluate(self, bar: "tqdm[Any]") -> None:
        """Evaluate, log the curve, and keep the meta-parameters beside it."""
        curves = self.evaluate(progress=not bar.disable)
        mean = curves.held_out.mean(1)
        save_checkpoint(meta_path(self.folder, self.step_number), self.shape.unflatten(self.meta), {})
        self._log(
            {"step": self.step_number, "evaluation": _rounded(mean.tolist()), "best": _rounded([mean.min().item()])[0]}
        )

    def _log_step(self, estimate: MetaGradient, lr: float) -> None:
        """Log one outer step."""
        gradient = estimate.gradient
        self._log(
            {
                "step": self.step_number,
                "loss": _rounded([estimate.loss.item()])[0],
                "gradient_norm": _rounded([gradient.norm().item()])[0],
                "clamped": int((gradient.abs() > self.config.clamp).sum()),
                "lr": lr,
                "seconds": round(self.seconds, 1),
            }
        )

    def _log(self, line: dict[str, Any]) -> None:
        """Append a line to the log."""
        with (self.folder / LOG).open("a") as file:
            file.write(json.dumps(line) + "\n")


def meta_path(folder: Path, step: int) -> Path:
    """Return where a run keeps the meta-parameters of an evaluated outer step."""
    return folder / f"meta-{step:06d}.safetensors"


def _make_estimator(unroll: Unroll, shape: MetaShape, config: TrainerConfig) -> AbstractGradientEstimator:
    """Return the estimator that the settings name."""
    shortest = config.shortest_horizon or config.longest_horizon or unroll.task.horizon
    horizons = Horizons(shortest, config.longest_horizon or shortest, config.staggered)
    return estimators[config.estimator](
        unroll,
        shape,
        unrolls=config.unrolls,
        truncation=config.truncation,
        horizons=horizons,
        sigma=config.sigma,
        emphasis=config.emphasis,
    )


def whole_lines(path: Path) -> list[str]:
    """Return the lines of a log, without a last one that a kill cut short."""
    return [line[:-1] for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _keep_lines_until(path: Path, step: int) -> None:
    """Drop the lines of a log that belong to later steps."""
    if path.exists():
        lines = [line for line in whole_lines(path) if json.loads(line)["step"] <= step]
        path.write_text("".join(line + "\n" for line in lines))


def _rounded(values: Sequence[float]) -> list[float | None]:
    """Return numbers with six digits, None where not finite, which JSON lacks."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]
