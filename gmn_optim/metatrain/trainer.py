"""Meta-training on one task: estimate a meta-gradient, take a step of Adam, log, evaluate, checkpoint."""

from pathlib import Path
from typing import Any

import torch

from gmn_optim.metatrain.checkpoint import load_checkpoint, save_checkpoint
from gmn_optim.metatrain.estimators import AbstractGradientEstimator, Horizons, MetaGradient, MetaShape, estimators
from gmn_optim.metatrain.evaluation import Curves, evaluate
from gmn_optim.metatrain.log import BEFORE_ALL, LOG, append_line, keep_lines_until, rounded
from gmn_optim.metatrain.outer_loop import CHECKPOINT, OuterLoop
from gmn_optim.metatrain.trainer_config import TrainerConfig
from gmn_optim.metatrain.unroll import Unroll


class MetaTrainer(OuterLoop):
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
        super().__init__(unroll.meta_parameters(), config, folder, description)
        self.unroll = unroll
        self.estimator = _make_estimator(unroll, self.shape, config)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.state = self.estimator.init(self.generator)
        if (self.folder / CHECKPOINT).exists():
            self._resume()
        else:
            keep_lines_until(self.folder / LOG, BEFORE_ALL)

    def step(self) -> float:
        """Take one outer step and return the mean meta-loss of its unrolls."""
        estimate, self.state = self.estimator.estimate(self.meta, self.state, self.generator)
        self._log_step(estimate, self.descend(estimate.gradient))
        return estimate.loss.item()

    def evaluate(self, progress: bool = False) -> Curves:
        """Train from scratch on the held-out seeds with the present meta-parameters; validation split."""
        meta = self.shape.unflatten(self.meta)
        return evaluate(self.unroll, meta, self.config.evaluation_seeds, progress=progress)

    def keep(self, progress: bool = False) -> None:
        """Evaluate, log the curve, and keep the meta-parameters beside it."""
        curves = self.evaluate(progress)
        mean = curves.held_out.mean(1)
        self.keep_meta()
        self._log(
            {"step": self.step_number, "evaluation": rounded(mean.tolist()), "best": rounded([mean.min().item()])[0]}
        )

    def save(self) -> None:
        """Write the checkpoint, replacing the old one in one move."""
        own = {"generator": self.generator.get_state(), "state": self.state}
        save_checkpoint(self.folder / CHECKPOINT, {**self.tree(), **own}, self.facts())

    def _resume(self) -> None:
        """Continue from the checkpoint in the folder, dropping log lines that are newer than it."""
        own = {"generator": self.generator.get_state(), "state": self.state}
        tree, facts = load_checkpoint(self.folder / CHECKPOINT, {**self.like(), **own}, self.settings)
        self.restore(tree, facts)
        self.generator.set_state(tree["generator"])
        self.state = tree["state"]
        keep_lines_until(self.folder / LOG, self.step_number)

    def _log_step(self, estimate: MetaGradient, lr: float) -> None:
        """Log one outer step."""
        gradient = estimate.gradient
        self._log(
            {
                "step": self.step_number,
                "loss": rounded([estimate.loss.item()])[0],
                "gradient_norm": rounded([gradient.norm().item()])[0],
                "clamped": int((gradient.abs() > self.config.clamp).sum()),
                "lr": lr,
                "seconds": round(self.seconds, 1),
            }
        )

    def _log(self, line: dict[str, Any]) -> None:
        """Append a line to the log."""
        append_line(self.folder / LOG, line)


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
