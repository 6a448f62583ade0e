"""The record of a comparison: one line of JSON for every training and timing, so that a stopped one can go on."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gmn_optim.comparison.arms import Setting
from gmn_optim.comparison.training import Measurements
from gmn_optim.errors import CheckpointError, InvalidArgumentError
from gmn_optim.tasks.base import Split

SETTINGS, LINES = "settings.json", "trainings.jsonl"


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How arms are compared.

    Attributes:
        seeds: Trainings on the test set of each arm at its best setting.
        tuning_seeds: Trainings on the validation set at each setting; of other seeds.
        steps: Length of a training; None for each task's horizon.
        every: Steps between two measurements of the held-out loss.
        examples: Of a held-out set at most; a larger one is represented by so many, evenly spaced.
        rounds: Of the timing against Adam; 0 for none.
        threads: Processor threads of every arm.

    Example:
        >>> Protocol(steps=10, every=20)
        Traceback (most recent call last):
            ...
        gmn_optim.errors.InvalidArgumentError: every=20 exceeds steps=10; measure at least once in a training
    """

    seeds: int = 5
    tuning_seeds: int = 2
    steps: int | None = None
    every: int = 20
    examples: int = 2_000
    rounds: int = 5
    threads: int = 1

    def __post_init__(self) -> None:
        least = {"seeds": 1, "tuning_seeds": 1, "every": 1, "examples": 1, "rounds": 0, "threads": 1}
        faults = [f"{name}={getattr(self, name)!r}" for name, value in least.items() if getattr(self, name) < value]
        if faults:
            raise InvalidArgumentError(f"{', '.join(faults)} is too low; expected at least 1 (rounds: at least 0)")
        if self.steps is not None and self.every > self.steps:
            raise InvalidArgumentError(
                f"every={self.every} exceeds steps={self.steps}; measure at least once in a training"
            )


@dataclass(frozen=True)
class Training:
    """One training and what it gave.

    Attributes:
        task: Name of the task.
        arm: Name of the arm.
        setting: Its step size and options.
        seed: Of initial parameters and batches.
        split: ``validation`` while tuning, else ``test``.
        every: Steps between two measurements.
        extended: Whether the setting lies beyond the stated grid.
        measurements: What it gave.
    """

    task: str
    arm: str
    setting: Setting
    seed: int
    split: Split
    every: int
    extended: bool
    measurements: Measurements

    @property
    def key(self) -> tuple[object, ...]:
        """What tells this training from every other of a comparison."""
        return self.task, self.arm, self.setting, self.seed, self.split


@dataclass(frozen=True)
class Timing:
    """Time of an arm's first steps as a multiple of Adam's, round by round.

    Attributes:
        task: Name of the task.
        arm: Name of the arm.
        ratios: One for each round.
        seconds: Median time of one of the arm's steps.
        steps: Of a round: those to the target, or the most that are timed.
        parameters: How many numbers the task's network learns.
    """

    task: str
    arm: str
    ratios: list[float]
    seconds: float
    steps: int
    parameters: int


class Record:
    """All trainings and timings of a comparison, kept in a folder or in memory alone.

    Args:
        folder: Where the lines are; None for memory alone.

    Example:
        >>> record = Record(None)
        >>> record.add(Timing("quadratic", "soap", [2.0, 2.5, 2.1], 0.001, steps=100, parameters=10))
        >>> record.timings[("quadratic", "soap")].ratios
        [2.0, 2.5, 2.1]
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self.trainings: dict[tuple[object, ...], Training] = {}
        self.timings: dict[tuple[str, str], Timing] = {}
        for line in _read_lines(folder):
            if line["kind"] != "timing" or "steps" in line:  # before, timings left out the first steps
                self._keep(_from_json(line))

    def start(self, protocol: Protocol) -> None:
        """Begin in a new folder, or go on in one of the same protocol.

        Raises:
            CheckpointError: the folder was filled under another protocol.
        """
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path, wanted = self._folder / SETTINGS, asdict(protocol)
        if path.exists():
            _require_same(path, json.loads(path.read_text()), wanted)
        path.write_text(json.dumps(wanted, indent=1) + "\n")
        _drop_partial_line(self._folder / LINES)

    def protocol(self) -> Protocol:
        """Return the protocol of a folder.

        Raises:
            CheckpointError: the folder holds no comparison.
        """
        path = None if self._folder is None else self._folder / SETTINGS
        if path is None or not path.exists():
            raise CheckpointError(f"{path} does not exist; give the folder of a comparison (its --out)")
        return Protocol(**json.loads(path.read_text()))

    def add(self, entry: Training | Timing) -> None:
        """Keep an entry and write its line."""
        self._keep(entry)
        if self._folder is not None:
            with (self._folder / LINES).open("a") as file:
                file.write(json.dumps(_to_json(entry)) + "\n")

    def of(self, task: str, arm: str, split: Split) -> list[Training]:
        """Return an arm's trainings on a task, in the order in which they were made."""
        return [each for each in self.trainings.values() if (each.task, each.arm, each.split) == (task, arm, split)]

    def _keep(self, entry: Training | Timing) -> None:
        """Put an entry where it is looked for."""
        if isinstance(entry, Timing):
            self.timings[entry.task, entry.arm] = entry
        else:
            self.trainings[entry.key] = entry


def _require_same(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise if a folder's protocol is another one."""
    changed = [
        f"{name} was {found.get(name)!r}, now {value!r}" for name, value in wanted.items() if found.get(name) != value
    ]
    if changed:
        raise CheckpointError(
            f"{path} was written under other settings ({'; '.join(changed)}): figures would not be comparable. Give "
            "the same settings to go on, or another folder"
        )


def _read_lines(folder: Path | None) -> Iterator[dict[str, Any]]:
    """Yield the lines of a folder, without a last one that a kill cut short."""
    path = None if folder is None else folder / LINES
    if path is not None and path.exists():
        whole, _, _ = path.read_text().rpartition("\n")
        yield from (json.loads(line) for line in whole.splitlines())


def _drop_partial_line(path: Path) -> None:
    """Cut off a last line that has no end, so that the next one starts on its own."""
    text = path.read_text() if path.exists() else ""
    if text and not text.endswith("\n"):
        path.write_text("".join(text.rpartition("\n")[:2]))


def _to_json(entry: Training | Timing) -> dict[str, Any]:
    """Return an entry as JSON values; None stands for what is not finite, which JSON lacks."""
    if isinstance(entry, Timing):
        return {"kind": "timing", **asdict(entry)}
    values = {name: getattr(entry, name) for name in ("task", "arm", "seed", "split", "every", "extended")}
    found = entry.measurements._asdict()
    curves = {name: [v if math.isfinite(v) else None for v in found[name]] for name in ("held_out", "training")}
    setting = {"lr": entry.setting.lr, "options": dict(entry.setting.options)}
    return {"kind": "training", **values, **setting, **found, **curves}


def _from_json(line: dict[str, Any]) -> Training | Timing:
    """Return the entry that a line holds."""
    values = dict(line)
    if values.pop("kind") == "timing":
        return Timing(**values)
    held_out, training = ([math.inf if v is None else v for v in values.pop(name)] for name in ("held_out", "training"))
    measurements = Measurements(held_out, training, values.pop("seconds"), values.pop("stopped"))
    setting = Setting(values.pop("lr"), tuple(sorted(values.pop("options").items())))
    return Training(setting=setting, measurements=measurements, **values)
