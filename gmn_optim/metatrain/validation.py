"""Validation of a run over a family: every kept file of meta-parameters, on the family's validation tasks."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gmn_optim.errors import CheckpointError, InvalidArgumentError
from gmn_optim.metatrain.checkpoint import load_checkpoint
from gmn_optim.metatrain.family_evaluation import (
    MULTIPLIERS,
    Curve,
    FamilyEvaluation,
    Protocol,
    compare,
    sweep_nominal,
    train_curve,
)
from gmn_optim.metatrain.log import append_line, drop_unfinished_line, read_lines, rounded
from gmn_optim.metatrain.outer_loop import meta_path
from gmn_optim.metatrain.runs import read_run
from gmn_optim.metatrain.unroll import Meta
from gmn_optim.rule import RuleConfig, UpdateRule
from gmn_optim.tasks.family import families

VALIDATION = "validation.jsonl"


class Validation:
    """Measures the meta-parameters that a run kept, line by line, so that it goes on where it was stopped.

    Each line of ``validation.jsonl`` tells one thing: curves of the nominal term alone on a task, the curve of the
    rule of an outer step on a task, or the summary of an outer step.

    Args:
        folder: Of a run over a family; it may be under way.
        protocol: How trainings are measured. Lines of other protocols in the file stay, and count for nothing.
        multipliers: Of the nominal term's step size.

    Raises:
        CheckpointError: the folder holds no run over a family.
    """

    def __init__(self, folder: str | Path, protocol: Protocol, multipliers: Sequence[float] = MULTIPLIERS) -> None:
        self.folder = Path(folder)
        settings = read_run(self.folder)["settings"]
        if "family" not in settings:
            raise CheckpointError(f"{self.folder} is no run over a family; 'meta-train --family' makes one")
        self.names = families[settings["family"]]().validation
        self.config = RuleConfig.from_dict(settings["rule"])
        self.protocol = protocol
        self.multipliers = tuple(multipliers)
        self.settings = {**protocol._asdict(), "seeds": list(protocol.seeds), "multipliers": list(self.multipliers)}
        drop_unfinished_line(self.path)
        self._lines = [line for line in read_lines(self.path) if line["settings"] == self.settings]

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
        nominal = {name: self._nominal(name, progress) for name in tqdm(self.names, "nominal", disable=not progress)}
        chosen = tqdm(list(steps) or kept, "outer steps", disable=not progress)
        return {step: self._evaluate(step, nominal, progress) for step in chosen}

    def _nominal(self, name: str, progress: bool) -> dict[float, Curve]:
        """Return the curves of the nominal term on a task."""
        for line in self._lines:
            if "nominal" in line and line["task"] == name:
                return {float(key): _restored(curve) for key, curve in line["nominal"].items()}
        curves = sweep_nominal(name, self.config, self.protocol, self.multipliers, progress)
        self._write({"task": name, "nominal": {str(key): rounded(curve) for key, curve in curves.items()}})
        return self._nominal(name, progress)

    def _evaluate(self, step: int, nominal: dict[str, dict[float, Curve]], progress: bool) -> FamilyEvaluation:
        """Return the evaluation of an outer step, and write its summary if it is new."""
        bar = tqdm(self.names, f"step {step}", disable=not progress, leave=False)
        found = compare({name: self._curve(name, step, progress) for name in bar}, nominal, self.protocol.every)
        if not any("factor" in line and line["step"] == step for line in self._lines):
            tables = {"factors": _rounded_table(found.factors), "ratios": _rounded_table(found.ratios)}
            factor, worst = rounded([found.factor, found.worst_ratio])
            self._write({"step": step, "factor": factor, "worst_ratio": worst, **tables})
        return found

    def _curve(self, name: str, step: int, progress: bool) -> Curve:
        """Return the curve of an outer step on a task."""
        for line in self._lines:
            if "curve" in line and (line["task"], line["step"]) == (name, step):
                return _restored(line["curve"])
        curve = train_curve(name, self.config, self._meta(step), self.protocol, progress)
        self._write({"step": step, "task": name, "curve": rounded(curve)})
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


def kept_steps(folder: Path) -> list[int]:
    """Return the outer steps whose meta-parameters a run kept."""
    found = (re.fullmatch(r"meta-(\d+)\.safetensors", path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)


def _rounded_table(values: dict[str, float]) -> dict[str, float | None]:
    """Return numbers by name with six digits."""
    return dict(zip(values, rounded(list(values.values())), strict=True))


def _restored(curve: list[float | None]) -> Curve:
    """Return a curve from its JSON values, infinity for None."""
    return [math.inf if value is None else value for value in curve]
