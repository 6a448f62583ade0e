"""Meta-training over a family of tasks, by one process or by several that compute the same meta-gradient."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gmn_optim.errors import MetaTrainingError
from gmn_optim.metatrain.checkpoint import load_checkpoint, save_checkpoint
from gmn_optim.metatrain.family_config import FamilyConfig
from gmn_optim.metatrain.frozen import trainable_mask
from gmn_optim.metatrain.log import BEFORE_ALL, LOG, append_line, keep_lines_until, rounded
from gmn_optim.metatrain.outer_loop import CHECKPOINT, OuterLoop
from gmn_optim.metatrain.processes import Processes
from gmn_optim.metatrain.slot_report import SlotReport, report_of
from gmn_optim.metatrain.slots import Slot, SlotProgress, draw_perturbations
from gmn_optim.metatrain.standardization import slot_gradient
from gmn_optim.rule import UpdateRule
from gmn_optim.tasks.family import AbstractTaskFamily


class FamilyTrainer(OuterLoop):
    """Meta-trains a rule on tasks drawn from a family, in a folder from which a killed run goes on bit for bit.

    Each of several processes trains the slots dealt to it and tells their losses; each draws the perturbations of
    all slots from their seeds, and so computes the same meta-gradient and takes the same step. A slot that raises an
    error counts for nothing in its outer step, is named in the log, and draws a new task at its next turn.

    Args:
        family: Tasks are drawn from it.
        rule: Meta-training starts from its meta-parameters.
        config: Settings.
        folder: Made if it does not exist; all processes must see the same one. A checkpoint in it is continued.
        description: Further facts that must not change between parts of a run (names of family and rule).
        processes: That share the run; their number may change between parts of it.

    Raises:
        CheckpointError: the folder holds a checkpoint of other settings, or a damaged one.

    Reference:
        Vicol, Metz and Sohl-Dickstein (2021), arXiv 2112.13835, for persistent evolution strategies; Metz et al.
        (2022), arXiv 2203.11860, for families of tasks.

    Example:
        >>> import tempfile
        >>> from gmn_optim.rule import RuleConfig
        >>> from gmn_optim.tasks.quadratic import QuadraticTask
        >>> class Quadratics(AbstractTaskFamily):
        ...     validation = test = ("quadratic",)
        ...     def sample(self, generator):
        ...         return QuadraticTask(size=int(torch.randint(2, 9, (), generator=generator)))
        >>> config = FamilyConfig(outer_steps=2, unrolls=4, slots=2, slots_per_step=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer = FamilyTrainer(Quadratics(), UpdateRule(RuleConfig(body=None)), config, folder)
        ...     trainer.run(progress=False).shape
        torch.Size([2])
    """

    config: FamilyConfig

    def __init__(
        self,
        family: AbstractTaskFamily,
        rule: UpdateRule,
        config: FamilyConfig,
        folder: str | Path,
        description: dict[str, Any] | None = None,
        processes: Processes | None = None,
    ) -> None:
        meta = {name: parameter.detach() for name, parameter in rule.named_parameters()}
        super().__init__(meta, config, folder, description)
        self.family = family
        self.rule = rule
        self.processes = processes or Processes()
        self.mask = trainable_mask(meta, config.frozen)
        self.progress = [SlotProgress() for _ in range(config.slots)]
        self.perturbations = torch.zeros(config.slots, config.pairs, len(self.meta), dtype=self.meta.dtype)
        self.slots: dict[int, Slot] = {}
        if (self.folder / CHECKPOINT).exists():
            self._resume()
        elif self.processes.is_first:
            keep_lines_until(self.folder / LOG, BEFORE_ALL)

    def step(self) -> float:
        """Take one outer step and return the mean meta-loss of the positive sides of its slots.

        Raises:
            MetaTrainingError: every slot of the step failed.
        """
        started = time.monotonic()
        turn = self.config.slots_of(self.step_number)
        noise = {slot: draw_perturbations(self.config, slot, self.step_number, self.mask) for slot in turn}
        self._renew(turn)
        reports = self._share({slot: self._report(slot, noise[slot]) for slot in turn if self.processes.owns(slot)})
        gradients = [self._absorb(slot, report, noise[slot]) for slot, report in reports.items() if not report.failed]
        self._give_up(reports)
        gradient = torch.stack(gradients).mean(0)
        lr = self.descend(gradient)
        return self._log_step(reports, gradient, lr, time.monotonic() - started)

    def keep(self, progress: bool = False) -> None:
        """Keep the meta-parameters; they are evaluated apart from training, see ``validation``."""
        if self.processes.is_first:
            self.keep_meta()

    def is_checkpoint_due(self) -> bool:
        """Return whether the first process finds that a checkpoint is due."""
        return self.processes.agree(super().is_checkpoint_due())

    def save(self) -> None:
        """Write a file for each slot under way, then the checkpoint, and remove the files of the one before."""
        for number, slot in self.slots.items():
            if not self.progress[number].is_over:
                save_checkpoint(self._slot_path(number), slot.state, {})
        self.processes.wait()
        if self.processes.is_first:
            save_checkpoint(self.folder / CHECKPOINT, {**self.tree(), **self._shared()}, self.facts())
            for path in set(self.folder.glob("slot-*")) - set(self.folder.glob(self._slot_path("*").name)):
                path.unlink()

    def _renew(self, turn: list[int]) -> None:
        """Begin a new task in every slot whose horizon is over."""
        for slot in turn:
            if self.progress[slot].is_over:
                self.progress[slot] = self.progress[slot].renewed(self.config, slot)
                self.perturbations[slot] = 0.0
                self.slots.pop(slot, None)

    def _report(self, slot: int, noise: Tensor) -> SlotReport:
        """Return the report of one truncation of a slot of this process."""

        def advance() -> tuple[str, Tensor, Tensor]:
            if slot not in self.slots:
                self.slots[slot] = self._make_slot(slot)
            losses = self.slots[slot].advance(self.shape, self.meta, noise, self.progress[slot])
            return self.slots[slot].task.name, *losses

        return report_of(advance, self.config.pairs)

    def _share(self, own: dict[int, SlotReport]) -> dict[int, SlotReport]:
        """Return the reports of all slots of this step, each from the process that has the slot."""
        turn = self.config.slots_of(self.step_number)
        rows = torch.zeros(len(turn), SlotReport.width(self.config.pairs), dtype=torch.float64)
        for place, slot in enumerate(turn):
            if slot in own:
                rows[place] = own[slot].encode()
        found = self.processes.gather(rows)
        return {
            slot: SlotReport.decode(found[self.processes.owner(slot), place], self.meta.dtype)
            for place, slot in enumerate(turn)
        }

    def _absorb(self, slot: int, report: SlotReport, noise: Tensor) -> Tensor:
        """Count a truncation of a slot, and return its estimate of the meta-gradient (m)."""
        self.perturbations[slot] += noise
        self.progress[slot] = self.progress[slot]._replace(age=self.progress[slot].age + self.config.truncation)
        return slot_gradient(
            report.positive,
            report.negative,
            self.perturbations[slot],
            truncations=self.progress[slot].age // self.config.truncation,
            sigma=self.config.sigma,
            standardized=self.config.standardized,
            floor=self.config.difference_floor,
        )

    def _give_up(self, reports: dict[int, SlotReport]) -> None:
        """Let failed slots begin a new task at their next turn; raise if there are no others."""
        failed = {slot: report.text for slot, report in reports.items() if report.failed}
        for slot in failed:
            self.progress[slot] = self.progress[slot]._replace(age=self.progress[slot].end)
            self.slots.pop(slot, None)
        if len(failed) == len(reports):
            raise MetaTrainingError(
                f"every slot of outer step {self.step_number + 1} failed: {failed}; mend the tasks or the rule, then "
                "go on from the newest checkpoint"
            )

    def _log_step(self, reports: dict[int, SlotReport], gradient: Tensor, lr: float, seconds: float) -> float:
        """Log one outer step with a fact for each slot, and return its mean meta-loss."""
        loss = sum(r.positive.mean().item() for r in reports.values() if not r.failed)
        loss /= sum(not report.failed for report in reports.values())
        line = {
            "step": self.step_number,
            "loss": rounded([loss])[0],
            "gradient_norm": rounded([gradient.norm().item()])[0],
            "clamped": int((gradient.abs() > self.config.clamp).sum()),
            "lr": lr,
            "slots": [self._describe(slot, report) for slot, report in reports.items()],
            "step_seconds": round(seconds, 3),
            "seconds": round(self.seconds + seconds, 1),
        }
        if self.processes.is_first:
            append_line(self.folder / LOG, line)
        return loss

    def _describe(self, slot: int, report: SlotReport) -> dict[str, Any]:
        """Return what the log tells of a slot at an outer step."""
        draw, age, end = self.progress[slot]
        if report.failed:
            return {"slot": slot, "draw": draw, "failure": report.text}
        spread = (report.positive - report.negative).square().mean().sqrt()
        losses = rounded([report.positive.mean().item(), spread.item()])
        facts = {"slot": slot, "draw": draw, "task": report.text, "age": age, "horizon": end}
        return {**facts, "loss": losses[0], "difference": losses[1], "seconds": round(report.seconds, 3)}

    def _make_slot(self, slot: int) -> Slot:
        """Return a slot at the start of its present task."""
        return Slot(self.family, self.rule, self.config, slot, self.progress[slot].draw)

    def _slot_path(self, slot: int | str) -> Path:
        """Return where a checkpoint at this outer step keeps the inner trainings of a slot."""
        return self.folder / f"slot-{slot}-{self.step_number:06d}.safetensors"

    def _shared(self) -> dict[str, Tensor]:
        """Return what every process knows of all slots."""
        return {"progress": torch.tensor(self.progress), "perturbations": self.perturbations}

    def _resume(self) -> None:
        """Continue from the checkpoint in the folder, dropping log lines that are newer than it."""
        tree, facts = load_checkpoint(self.folder / CHECKPOINT, {**self.like(), **self._shared()}, self.settings)
        self.restore(tree, facts)
        self.perturbations = tree["perturbations"]
        self.progress = [SlotProgress(*numbers) for numbers in tree["progress"].tolist()]
        for number, progress in enumerate(self.progress):
            if self.processes.owns(number) and not progress.is_over:
                slot = self.slots[number] = self._make_slot(number)
                slot.state, _ = load_checkpoint(self._slot_path(number), slot.state, {})
        if self.processes.is_first:
            keep_lines_until(self.folder / LOG, self.step_number)
