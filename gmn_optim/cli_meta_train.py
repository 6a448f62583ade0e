"""The commands ``meta-train`` and ``validate``."""

import argparse
import inspect
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from gmn_optim.cli_cards import family_table, steps_table
from gmn_optim.cli_rule import add_rule_options, read_rule_options
from gmn_optim.errors import InvalidArgumentError


def add_meta_train(commands: Any) -> None:
    """Add ``meta-train``."""
    command = commands.add_parser(
        "meta-train",
        help="meta-train an update rule on a task or on a family of tasks",
        description="Meta-train an update rule. A run that was stopped goes on, bit for bit, by the same command. "
        "Several processes share a run over a family: torchrun --nproc-per-node 2 -m gmn_optim meta-train ...",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    inner = command.add_mutually_exclusive_group()
    inner.add_argument("--task", default="fashion-mnist-mlp", help="name of a task")
    inner.add_argument("--family", help="name of a family of tasks, in place of one task")
    command.add_argument("--folder", type=Path, required=True, help="where checkpoints and the log go")
    add_rule_options(command.add_argument_group("rule"))
    _add_settings(command.add_argument_group("training"))
    command.add_argument("--until", type=int, help="stop at this outer step, to go on later")
    command.add_argument("--compile", action="store_true", help="fuse the inner step; needs a C++ compiler")
    _add_common(command)
    command.set_defaults(run=_meta_train)


def add_validate(commands: Any) -> None:
    """Add ``validate``."""
    command = commands.add_parser(
        "validate",
        help="measure what a run over a family has reached",
        description="Train from scratch on the family's validation tasks with all meta-parameters that a run kept and "
        "that are not measured yet, and append the results to validation.jsonl in its folder. May be stopped, and run "
        "again while meta-training is under way.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("folder", type=Path, help="folder of a meta-training run over a family")
    command.add_argument("--step", type=int, action="append", default=[], help="outer step; all that were kept if none")
    command.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help="validation tasks; all if none")
    command.add_argument("--horizon", type=int, help="most inner steps of a training; the task's horizon if none")
    command.add_argument("--every", type=int, default=50, help="inner steps between two measurements")
    command.add_argument("--seeds", type=int, nargs="+", default=[10_001, 10_002], help="of the trainings")
    command.add_argument("--averages", action="store_true", help="measure the averages of parameters")
    command.add_argument("--share", type=float, default=1.0, help="of the learned term; 0 is the nominal term alone")
    _add_common(command)
    command.set_defaults(run=_validate)


def _add_common(command: Any) -> None:
    """Add the options of every command that computes."""
    command.add_argument("--threads", type=int, help="processor threads of each process")
    command.add_argument("--quiet", action="store_true", help="no progress bars")


def _add_settings(group: Any) -> None:
    """Add an option for every setting of both trainers; one that is not given is left to their own defaults."""
    from gmn_optim.metatrain import FamilyConfig, TrainerConfig

    meanings = {**_documented(FamilyConfig), **_documented(TrainerConfig)}
    own = {setting.name: setting.default for setting in fields(TrainerConfig)}
    for setting in fields(FamilyConfig):
        new = setting.name not in own
        if (kind := _option_kind(setting.type, new)) is not None:
            default = _show_default(own.get(setting.name), setting.default, new)
            text = f"{meanings[setting.name]} (default: {default})"
            option = "--" + setting.name.replace("_", "-")
            group.add_argument(option, **kind, default=argparse.SUPPRESS, help=text)


def _option_kind(kind: Any, new: bool) -> dict[str, Any] | None:
    """Return how a setting of a type is read from the command line, None if it is not."""
    if kind in (int, float, str):
        return {"type": kind}
    if new and kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if new:
        return {"nargs": "*", "metavar": "PATTERN"}
    return None


def _show_default(for_task: Any, for_family: Any, new: bool) -> str:
    """Return the default of a setting in words."""
    shown = " ".join(for_family) if isinstance(for_family, tuple) else str(for_family)
    if new:
        return f"{shown}; with --family only"
    return shown if for_task == for_family else f"{for_task}; {shown} with --family"


def _documented(described: type) -> dict[str, str]:
    """Return what the docstring of a class says of each attribute, in one line for argparse."""
    attributes = inspect.cleandoc(described.__doc__ or "").partition("Attributes:\n")[2]
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", attributes, flags=re.MULTILINE)
    return {name: " ".join(text.split()).replace("%", "%%") for name, text in found}


def _chosen(options: argparse.Namespace, kind: type) -> dict[str, Any]:
    """Return the settings that were given, or raise if one of them is not of this kind of run."""
    from gmn_optim.metatrain import FamilyConfig

    given = {setting.name for setting in fields(FamilyConfig) if hasattr(options, setting.name)}
    if strange := sorted(given - {setting.name for setting in fields(kind)}):
        shown = ", ".join("--" + name.replace("_", "-") for name in strange)
        raise InvalidArgumentError(f"{shown} given without --family; name a family, or leave it out")
    values = {name: getattr(options, name) for name in given}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _set_threads(options: argparse.Namespace) -> None:
    """Use as many threads as asked for."""
    import torch

    if options.threads is not None:
        if options.threads < 1:
            raise InvalidArgumentError(f"--threads is {options.threads}; expected at least 1")
        torch.set_num_threads(options.threads)


def _meta_train(options: argparse.Namespace) -> None:
    """Meta-train, or go on with a run."""
    _set_threads(options)
    if options.family is None:
        _meta_train_on_task(options)
    else:
        _meta_train_on_family(options)


def _meta_train_on_task(options: argparse.Namespace) -> None:
    """Meta-train on one task."""
    from gmn_optim.metatrain import MetaTrainer, TrainerConfig
    from gmn_optim.metatrain.processes import require_one_process
    from gmn_optim.metatrain.runs import build_unroll, describe_run

    require_one_process()
    config = TrainerConfig(**_chosen(options, TrainerConfig))
    rule = read_rule_options(options)
    unroll = build_unroll(options.task, rule, seed=config.seed, compiled=options.compile)
    trainer = MetaTrainer(unroll, config, options.folder, describe_run(options.task, rule))
    trainer.run(options.until, progress=not options.quiet)


def _meta_train_on_family(options: argparse.Namespace) -> None:
    """Meta-train on a family of tasks, together with the other processes if there are any."""
    from gmn_optim.metatrain import FamilyConfig, FamilyTrainer
    from gmn_optim.metatrain.processes import join_processes
    from gmn_optim.metatrain.runs import build_rule
    from gmn_optim.tasks import families

    if options.compile:
        raise InvalidArgumentError("--compile takes a minute for each task, and a family draws new ones; leave it out")
    config = FamilyConfig(**_chosen(options, FamilyConfig))
    rule = read_rule_options(options)
    family = families[options.family]()
    description = {"family": options.family, "rule": rule.to_dict()}
    with join_processes() as processes:
        built = build_rule(rule, seed=config.seed)
        trainer = FamilyTrainer(family, built, config, options.folder, description, processes)
        trainer.run(options.until, progress=processes.is_first and not options.quiet)


def _validate(options: argparse.Namespace) -> None:
    """Measure the kept meta-parameters of a run over a family."""
    from gmn_optim.metatrain.choice import choose_summary
    from gmn_optim.metatrain.family_evaluation import Protocol
    from gmn_optim.metatrain.validation import Validation

    _set_threads(options)
    protocol = Protocol(tuple(options.seeds), options.horizon, options.every, averages=options.averages)
    validation = Validation(options.folder, protocol, names=options.tasks, share=options.share)
    found = {step: each.to_dict() for step, each in validation.run(options.step, not options.quiet).items()}
    choice = choose_summary([{"step": step, **figures} for step, figures in found.items()])
    best = family_table(found[choice.summary["step"]])
    sys.stdout.write(f"{steps_table(found)}\n\nBest: {choice.reason}.\n\n{best}\n")
