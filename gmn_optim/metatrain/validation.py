"""Validation of a run over a family: every kept file of meta-parameters, on the family's validation tasks."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gmn_optim.errors import CheckpointError, InvalidArgumentError
from gmn_optim.metatrain.checkpoint import load_checkpoint
from gmn_optim.metatrain.choice import as_used
from gmn_optim.metatrain.family_config import LATER_SETTINGS
from gmn_optim.metatrain.family_evaluation import (
    MULTIPLIERS,
    TUNED_ADAM_LRS,
    Protocol,
    sweep_adam,
    sweep_nominal,
    train_curve,
)
from gmn_optim.metatrain.family_figures import Curve, FamilyEvaluation, References, Sweep, compare
from gmn_optim.metatrain.log import append_line, drop_unfinished_line, read_lines, rounded
from gmn_optim.metatrain.outer_loop import meta_path
from gmn_optim.metatrain.runs import kept_steps, read_run
from gmn_optim.metatrain.unroll import Meta
from gmn_optim.rule import RuleConfig, UpdateRule
from gmn_optim.tasks.family import families

VALIDATION = "validation.jsonl"


class Validation:
    """Measures the meta-parameters that a run kept, line by line, so that it goes on where it was stopped.

    Each line of ``validation.jsonl`` tells one thing: curves of the nominal term alone or of Adam on a task, the curve
    of the rule of an outer step on a task, or the summary of an outer step over the tasks that were measured.

    Args:
        folder: Of a run over a family; it may be under way.
        protocol: How trainings are measured. Lines of other protocols in the file stay, and count for nothing.
        multipliers: Of the nominal term's step size.
        names: Of validation tasks of the family, all of them by default.
        share: Of the learned term, see :class:`gmn_optim.rule.RuleConfig`.

    Raises:
        CheckpointError: the folder holds no run over a family.
        InvalidArgumentError: a name is none of the family's validation tasks.
    """

    def __init__(
        self,
        folder: str | Path,
        protocol: Protocol,
        multipliers: Sequence[float] = MULTIPLIERS,
        names: Sequence[str] = (),
        share: float = 1.0,
    ) -> None:
        self.folder = Path(folder)
        settings = read_run(self.folder)["settings"]
        if "family" not in settings:
            raise CheckpointError(f"{self.folder} is no run over a family; 'meta-train --family' makes one")
        self.names = _subset(families[settings["family"]]().validation, names)
        self.config = as_used(RuleConfig.from_dict(settings["rule"]), share)
        self.protocol = protocol
        self.multipliers = tuple(multipliers)
        self.settings = {**protocol._asdict(), "seeds": list(protocol.seeds), "multipliers": list(self.multipliers)}
        drop_unfinished_line(self.path)
        lines = read_lines(self.path)
        self._lines = [line for line in lines if {**LATER_SETTINGS, **line["settings"]} == self.settings]

    @property
    def share(self) -> float:
        """Return the share of the learned term that is measured."""
        return self.config.share

    @property
    def path(self) -> Path:
        """Return the file of the results."""
        return self.folder / VALIDATION

    def run(self, steps: Sequence[int] = (), progress: bool = False) -> dict[int, FamilyEvaluation]:
        """Measure what is not measured yet, and return everything by outer step.

        Args:
            steps: Outer steps, all that were kept by default.
            progress: Whether to show bars.

        Raises:
            InvalidArgumentError: an outer step was not kept.
        """
        kept = kept_steps(self.folder)
        if missing := sorted(set(steps) - set(kept)):
            raise InvalidArgumentError(f"no meta-parameters of outer steps {missing} in {self.folder}; kept: {kept}")
        bar = tqdm(self.names, "nominal term and Adam", disable=not progress)
        references = {name: References(self._nominal(name, progress), self._adam(name, progress)) for name in bar}
        chosen = tqdm(list(steps) or kept, "outer steps", disable=not progress)
        return {step: self._evaluate(step, references, progress) for step in chosen}

    def _nominal(self, name: str, progress: bool) -> Sweep:
        """Return the curves of the nominal term on a task."""
        return self._recorded_sweep("nominal", name, self.multipliers) or self._record_sweep(
            "nominal", name, sweep_nominal(name, self.config, self.protocol, self.multipliers, progress)
        )

    def _adam(self, name: str, progress: bool) -> Sweep:
        """Return the curves of Adam on a task."""
        return self._recorded_sweep("adam", name, TUNED_ADAM_LRS) or self._record_sweep(
            "adam", name, sweep_adam(name, self.protocol, progress)
        )

    def _recorded_sweep(self, kind: str, name: str, grid: Sequence[float]) -> Sweep | None:
        """Return curves at every step size of a grid that the file has already."""
        for line in self._lines:
            if kind in line and line["task"] == name and set(line[kind]) == {str(key) for key in grid}:
                return {float(key): _restored(curve) for key, curve in line[kind].items()}
        return None

    def _record_sweep(self, kind: str, name: str, curves: Sweep) -> Sweep:
        """Append curves to the file, and return them as it tells them."""
        self._write({"task": name, kind: {str(key): rounded(curve) for key, curve in curves.items()}})
        return {key: _restored(rounded(curve)) for key, curve in curves.items()}

    def _evaluate(self, step: int, references: dict[str, References], progress: bool) -> FamilyEvaluation:
        """Return the evaluation of an outer step, and write its summary if it is new."""
        bar = tqdm(self.names, f"step {step}", disable=not progress, leave=False)
        found = compare({name: self._curve(name, step, progress) for name in bar}, references, self.protocol.every)
        summary = {"step": step, "share": self.share, **found.to_dict()}
        if not any(line == {**summary, "settings": self.settings} for line in self._lines):
            self._write(summary)
        return found

    def _curve(self, name: str, step: int, progress: bool) -> Curve:
        """Return the curve of an outer step on a task."""
        for line in self._lines:
            if "curve" in line and (line["task"], line["step"], line.get("share", 1.0)) == (name, step, self.share):
                return _restored(line["curve"])
        curve = train_curve(name, self.config, self._meta(step), self.protocol, progress)
        self._write({"step": step, "share": self.share, "task": name, "curve": rounded(curve)})
        return self._curve(name, step, progress)

    def _meta(self, step: int) -> Meta:
        """Return the meta-parameters that were kept at an outer step."""
        like = {name: value.detach() for name, value in UpdateRule(self.config).named_parameters()}
        return load_checkpoint(meta_path(self.folder, step), like, {})[0]

    def _write(self, line: dict[str, Any]) -> None:
        """Append a result, with the settings that it belongs to."""
        line = {**line, "settings": self.settings}
        append_line(self.path, line)
        self._lines.append(line)


def _subset(known: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """Return the chosen validation tasks in the family's order, all if none is named."""
    if strange := sorted(set(names) - set(known)):
        raise InvalidArgumentError(f"{', '.join(strange)}: no validation task of the family; known: {', '.join(known)}")
    return tuple(name for name in known if name in names or not names)


def _restored(curve: list[float | None]) -> Curve:
    """Return a curve from its JSON values, infinity for None."""
    return [math.inf if value is None else value for value in curve]
