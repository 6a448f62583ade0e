"""The protocol: tune every arm on validation data, train it on other seeds, and measure on test data."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gmn_optim.comparison.arms import Arm, Setting, find_arms
from gmn_optim.comparison.figures import (
    STRONG_ARMS,
    OverallFigures,
    TaskFigures,
    overall_figures,
    task_figures,
    validation_scores,
    validation_target,
)
from gmn_optim.comparison.medians import with_medians
from gmn_optim.comparison.pictures import can_draw, draw_curves
from gmn_optim.comparison.record import Protocol, Record, Training
from gmn_optim.comparison.tables import notes, overall_json, overall_table, task_table, to_json
from gmn_optim.comparison.timing import MOST_STEPS, time_against_adam
from gmn_optim.comparison.training import train
from gmn_optim.comparison.tuning import Score, tune
from gmn_optim.errors import InvalidArgumentError, UnknownNameError
from gmn_optim.tasks.base import AbstractTask, Split, tasks

TUNING_SEED, TEST_SEED, TIMING_SEED = 710_000, 720_000, 730_000
"""The first seeds of each purpose; none was used in meta-training."""

Tasks = str | AbstractTask | Sequence[str] | Mapping[str, AbstractTask]


@dataclass(frozen=True)
class Comparison:
    """The figures of a comparison; ``str()`` of it is Markdown.

    Attributes:
        protocol: How it was made.
        tasks: Figures by name of the task.
        skipped: By name, the requirement for pip that an arm lacks.
        rivals: Names of the arms whose best every arm is compared with.

    Example:
        >>> short = Protocol(seeds=1, tuning_seeds=1, steps=20, every=10, rounds=0)
        >>> print(compare("quadratic", ["gmn"], protocol=short))  # doctest: +ELLIPSIS
        ## quadratic
        <BLANKLINE>
        arm  | setting ...
    """

    protocol: Protocol
    tasks: dict[str, TaskFigures]
    skipped: dict[str, str] = field(default_factory=dict)
    rivals: tuple[str, ...] = STRONG_ARMS

    @property
    def overall(self) -> dict[str, OverallFigures]:
        """Return by name every arm's figures over all tasks."""
        return overall_figures(list(self.tasks.values()), self.rivals)

    def __str__(self) -> str:
        """Return a table for each task, and one over all of them, with what must be known of them."""
        parts = []
        for name, task in self.tasks.items():
            parts += [f"## {name}", task_table(task), "\n".join(f"- {note}" for note in notes(task))]
        parts += ["## All tasks", overall_table(self.overall)] if len(self.tasks) > 1 else []
        parts += [f"Skipped: {name} (pip install '{needed}')." for name, needed in self.skipped.items()]
        return "\n\n".join(part for part in parts if part)

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as JSON values."""
        per_task = {name: to_json(task) for name, task in self.tasks.items()}
        return {"protocol": vars(self.protocol), "tasks": per_task, "overall": overall_json(self.overall)}

    def save(self, folder: Path) -> None:
        """Write ``report.md``, ``figures.json`` and, where matplotlib is installed, ``TASK.png`` into a folder."""
        (folder / "report.md").write_text(str(self) + "\n", encoding="utf-8")
        (folder / "figures.json").write_text(json.dumps(self.to_dict()) + "\n", encoding="utf-8")
        for name, task in self.tasks.items() if can_draw() else ():
            draw_curves(task, name, folder / f"{name}.png")


def compare(
    task: Tasks,
    chosen: Sequence[str | Arm],
    *,
    folder: str | Path | None = None,
    protocol: Protocol | None = None,
    progress: bool = False,
) -> Comparison:
    """Compare arms with tuned Adam on tasks.

    Every arm is tuned on the validation set over its stated grid, at the full length of a training: Adam for its lowest
    loss, which is the target, every other arm for the fewest steps to that target. At its best setting it then trains
    on other seeds, and is measured on the test set. A comparison in a folder that was stopped goes on by the same call.

    Args:
        task: A task or several, by registered name or as objects by name.
        chosen: Arms, by registered name or as :class:`Arm`. Adam joins by itself.
        folder: Where the record, tables and pictures go; None to write nothing.
        protocol: Seeds, steps and so on; :class:`Protocol` has the defaults.
        progress: Whether to show a bar.

    Raises:
        UnknownNameError: no task or arm has that name.
        CheckpointError: the folder was filled under another protocol.
        InvalidArgumentError: a task or a number makes no sense.

    Example:
        >>> short = Protocol(seeds=2, tuning_seeds=1, steps=20, every=10, rounds=0)
        >>> found = compare("quadratic", ["sgd-momentum"], protocol=short)
        >>> list(found.tasks["quadratic"].arms)
        ['adam', 'sgd-momentum']
    """
    by_name, (arms, skipped) = _tasks_by_name(task), find_arms(chosen)
    run = _Run(Record(None if folder is None else Path(folder)), protocol or Protocol(), progress)
    run.record.start(run.protocol)
    with _threads(run.protocol.threads), run.bar:
        for name, each in by_name.items():
            run.compare_on(name, each, arms)
    names = [arm.name for arm in arms]
    figures = {name: task_figures(run.record, name, names) for name in by_name}
    found = Comparison(run.protocol, {name: each for name, each in figures.items() if each}, skipped)
    if folder is not None:
        found.save(Path(folder))
    return found


def report(
    folder: str | Path, tasks: Sequence[str] | None = None, rivals: Sequence[str] | None = None, medians: int = 1
) -> Comparison:
    """Return the figures of a folder, complete or not; write tables and pictures anew if nothing else is given.

    Args:
        folder: A comparison's.
        tasks: Names of tasks; None for all.
        rivals: Names of the arms whose best every arm is compared with; None for the strong ones.
        medians: Measurements of which test curves are running medians, so that no lucky point decides; 1 for the
            curves as they are.

    Raises:
        CheckpointError: the folder holds no comparison.
        UnknownNameError: it has no such task or arm.
        InvalidArgumentError: ``medians`` is not odd.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     short = Protocol(seeds=1, tuning_seeds=1, steps=20, every=10, rounds=0)
        ...     found = compare("quadratic", [], folder=folder, protocol=short)
        ...     str(report(folder)) == str(found)
        True
    """
    record = Record(Path(folder))
    protocol = record.protocol()
    known = dict.fromkeys(each.task for each in record.trainings.values())
    _require_known("task", tasks or (), known)
    _require_known("arm", rivals or (), dict.fromkeys(each.arm for each in record.trainings.values()))
    seen = record if medians == 1 else with_medians(record, medians)
    figures = {name: task_figures(seen, name) for name in tasks or known}
    found = Comparison(protocol, {n: each for n, each in figures.items() if each}, rivals=tuple(rivals or STRONG_ARMS))
    if not tasks and not rivals and medians == 1:
        found.save(Path(folder))
    return found


def _require_known(kind: str, names: Sequence[str], known: Collection[str]) -> None:
    """Raise if a comparison has no trainings of some names."""
    missing = [name for name in names if name not in known]
    if missing:
        raise UnknownNameError(f"the comparison has no {kind} {', '.join(missing)}; it has {', '.join(known)}")


class _Run:
    """A comparison that is being made."""

    def __init__(self, record: Record, protocol: Protocol, progress: bool) -> None:
        self.record, self.protocol = record, protocol
        self.bar = tqdm(desc="trainings", total=0, disable=not progress)

    def compare_on(self, name: str, task: AbstractTask, arms: Sequence[Arm]) -> None:
        """Tune, train and time every arm on one task."""
        tuning, tests = self.protocol.tuning_seeds, self.protocol.seeds
        tuned = {arm.name: len(arm.settings()) * tuning if len(arm.settings()) > 1 else 0 for arm in arms}
        self.bar.total += sum(tuned.values()) + tests * len(arms)
        best = {}
        for arm in arms:
            best[arm.name] = (arm, self._tune(name, task, arm))
            self._train(name, task, *best[arm.name], "test")
        for arm in arms:
            self._time(name, task, best["adam"], best[arm.name])

    def _tune(self, name: str, task: AbstractTask, arm: Arm) -> Setting:
        """Return an arm's best setting."""

        target = None if arm.name == "adam" else validation_target(self.record, name)

        def evaluate(setting: Setting, extended: bool) -> Score:
            self.bar.total += self.protocol.tuning_seeds if extended else 0
            return validation_scores(self._train(name, task, arm, setting, "validation", extended), target)[setting]

        return tune(arm, evaluate)

    def _train(
        self, name: str, task: AbstractTask, arm: Arm, setting: Setting, split: Split, extended: bool = False
    ) -> list[Training]:
        """Return the trainings of all seeds of a split, those on record and the missing ones."""
        test = split == "test"
        first, count = (TEST_SEED, self.protocol.seeds) if test else (TUNING_SEED, self.protocol.tuning_seeds)
        found = []
        for seed in range(first, first + count):
            self.bar.set_postfix_str(f"{name}, {arm.name}, {setting}", refresh=False)
            key = (name, arm.name, setting, seed, split)
            if key not in self.record.trainings:
                self.record.add(self._trained(name, task, arm, setting, seed, split, extended))
            found.append(self.record.trainings[key])
            self.bar.update()
        return found

    def _trained(
        self, name: str, task: AbstractTask, arm: Arm, setting: Setting, seed: int, split: Split, extended: bool
    ) -> Training:
        """Train once."""
        steps, every = self.protocol.steps or task.horizon, self.protocol.every
        if every > steps:
            raise InvalidArgumentError(f"every={every} exceeds the {steps} steps of {name}; measure more often")
        limit = self.protocol.examples
        found = train(task, arm, setting, seed=seed, split=split, steps=steps, every=every, examples=limit)
        return Training(name, arm.name, setting, seed, split, every, extended, found)

    def _time(self, name: str, task: AbstractTask, adam: tuple[Arm, Setting], other: tuple[Arm, Setting]) -> None:
        """Time an arm against Adam, unless that is on record."""
        rounds, arm = self.protocol.rounds, other[0].name
        if rounds and arm != "adam" and (name, arm) not in self.record.timings:
            self.bar.set_postfix_str(f"{name}, {arm}: timing", refresh=True)
            needed = task_figures(self.record, name, [arm]).arms[arm].steps_to_target
            steps = int(min(max(needed, 1), MOST_STEPS, self.protocol.steps or task.horizon))
            pair = (adam, other)
            self.record.add(time_against_adam(task, name, *pair, rounds=rounds, seed=TIMING_SEED, steps=steps))


def _tasks_by_name(task: Tasks) -> dict[str, AbstractTask]:
    """Return tasks by name."""
    if isinstance(task, Mapping):
        return dict(task)
    if isinstance(task, AbstractTask):
        return {type(task).__name__: task}
    names = [task] if isinstance(task, str) else list(task)
    return {name: tasks[name]() for name in names}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with as many threads inside this context."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
