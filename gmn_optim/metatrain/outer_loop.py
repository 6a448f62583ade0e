"""What every meta-training run has in common: Adam on the meta-parameters, a folder, steps until the last one."""

import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from gmn_optim.metatrain.checkpoint import save_checkpoint
from gmn_optim.metatrain.estimators import MetaShape
from gmn_optim.metatrain.trainer_config import TrainerConfig
from gmn_optim.metatrain.unroll import Meta

CHECKPOINT = "checkpoint.safetensors"


class OuterLoop(ABC):
    """Takes outer steps in a folder; what a step is, and what is kept of it, is for subclasses to say.

    Args:
        meta: Meta-parameters to start from.
        config: Settings.
        folder: Made if it does not exist.
        description: Further facts that must not change between parts of a run.
    """

    def __init__(
        self, meta: Meta, config: TrainerConfig, folder: str | Path, description: dict[str, Any] | None
    ) -> None:
        self.config = config
        self.folder = Path(folder)
        self.shape = MetaShape(meta)
        self.meta = self.shape.flatten(meta).clone()
        self.optimizer = torch.optim.Adam([self.meta], lr=config.lr, betas=config.betas)
        self.step_number = 0
        self.seconds = 0.0
        self.settings = {"trainer": config.to_dict(), **(description or {})}
        self.folder.mkdir(parents=True, exist_ok=True)
        self._saved = time.monotonic()

    @abstractmethod
    def step(self) -> float:
        """Take one outer step and return the mean loss that a progress bar shows."""

    @abstractmethod
    def keep(self, progress: bool = False) -> None:
        """Keep what this outer step reached: every ``evaluate_every`` steps, at the start and at the end."""

    @abstractmethod
    def save(self) -> None:
        """Write the checkpoint, replacing the old one in one move."""

    def is_checkpoint_due(self) -> bool:
        """Return whether ``checkpoint_every`` seconds have passed since the last checkpoint."""
        return time.monotonic() - self._saved > self.config.checkpoint_every

    def run(self, until: int | None = None, progress: bool = True) -> Tensor:
        """Train up to outer step ``until`` (all by default) and return the flat meta-parameters (m)."""
        until = self.config.outer_steps if until is None else min(until, self.config.outer_steps)
        bar = tqdm(total=until, initial=self.step_number, desc="meta-training", unit="step", disable=not progress)
        with torch.no_grad(), bar:
            while self.step_number < until:
                if self.step_number == 0:
                    self.keep(progress)
                started = time.monotonic()
                loss = self.step()
                self.seconds += time.monotonic() - started
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update()
                self._keep_and_save(self.step_number == until, progress)
        return self.meta

    def descend(self, gradient: Tensor) -> float:
        """Let Adam take a step along a meta-gradient (m), clamped, and return its step size."""
        lr = self.config.learning_rate(self.step_number)
        self.optimizer.param_groups[0]["lr"] = lr
        self.meta.grad = gradient.nan_to_num(0.0).clamp(-self.config.clamp, self.config.clamp)
        self.optimizer.step()
        self.step_number += 1
        return lr

    def keep_meta(self) -> None:
        """Write the meta-parameters of this outer step to a file of their own."""
        save_checkpoint(meta_path(self.folder, self.step_number), self.shape.unflatten(self.meta), {})

    def tree(self) -> dict[str, Any]:
        """Return the tensors that every checkpoint holds."""
        return {"meta": self.meta, "adam": dict(self.optimizer.state.get(self.meta, {}))}

    def like(self) -> dict[str, Any]:
        """Return tensors shaped like :meth:`tree` after a first step."""
        return {
            "meta": self.meta,
            "adam": {"step": torch.zeros(()), "exp_avg": self.meta, "exp_avg_sq": self.meta},
        }

    def facts(self) -> dict[str, Any]:
        """Return the facts that every checkpoint tells."""
        return {"settings": self.settings, "step": self.step_number, "seconds": self.seconds}

    def restore(self, tree: dict[str, Any], facts: dict[str, Any]) -> None:
        """Take over what a checkpoint holds of :meth:`tree` and :meth:`facts`."""
        self.meta.copy_(tree["meta"])
        self.optimizer.state[self.meta] = tree["adam"]
        self.step_number, self.seconds = facts["step"], facts["seconds"]

    def _keep_and_save(self, last: bool, progress: bool) -> None:
        """Keep what is due after an outer step, and write a checkpoint if one is due."""
        kept = last or self.step_number % self.config.evaluate_every == 0
        if kept:
            self.keep(progress)
        if kept or self.is_checkpoint_due():
            self.save()
            self._saved = time.monotonic()


def meta_path(folder: Path, step: int) -> Path:
    """Return where a run keeps the meta-parameters of an outer step."""
    return folder / f"meta-{step:06d}.safetensors"
