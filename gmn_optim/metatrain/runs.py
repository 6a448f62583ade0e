"""Meta-training runs as folders: how one is described, rebuilt from its folder, and exported."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from gmn_optim.errors import CheckpointError, InvalidArgumentError
from gmn_optim.metatrain.baselines import tune
from gmn_optim.metatrain.export import choose_step, load_meta, measure_results, read_evaluations, record_replay
from gmn_optim.metatrain.outer_loop import CHECKPOINT
from gmn_optim.metatrain.unroll import Unroll
from gmn_optim.rule import RuleConfig, UpdateRule
from gmn_optim.tasks import tasks
from gmn_optim.version import __version__
from gmn_optim.weights import Weights, WeightsCard, require_file_name, save_weights

REPORT_SEEDS = (1, 2, 3, 4, 5)
"""Of the trainings that a card reports; neither meta-training nor validation saw them."""


def build_unroll(task: str, config: RuleConfig, *, seed: int, compiled: bool = False) -> Unroll:
    """Return the unroll of a run, the rule's meta-parameters drawn from ``seed``; global randomness is untouched.

    Raises:
        UnknownNameError: no such task.
    """
    return Unroll(tasks[task](), build_rule(config, seed=seed), compiled)


def build_rule(config: RuleConfig, *, seed: int) -> UpdateRule:
    """Return a rule, its meta-parameters drawn from ``seed``; global randomness is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UpdateRule(config)


def describe_run(task: str, config: RuleConfig) -> dict[str, Any]:
    """Return the facts that a run's checkpoint keeps beside the trainer's settings."""
    return {"task": task, "rule": config.to_dict()}


def read_run(folder: Path) -> dict[str, Any]:
    """Return settings, step and seconds of a run from its checkpoint.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    path = folder / CHECKPOINT
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()["facts"])
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is no readable checkpoint of a meta-training run ({error})") from error


def export_run(
    folder: str | Path,
    name: str,
    out: str | Path,
    *,
    description: str = "",
    aliases: tuple[str, ...] = (),
    limits: tuple[str, ...] = (),
    commit: str = "",
    step: int | None = None,
    every: int = 20,
    progress: bool = False,
) -> Weights:
    """Choose a run's best checkpoint on the validation set, measure it on the test set, write weights and card.

    Args:
        folder: Of the run.
        name: Of the weights.
        out: Where both files go.
        description: One sentence.
        aliases: Further names.
        limits: Known limits.
        commit: Revision that the run was made with.
        step: Outer step; None for the best on the validation set.
        every: Inner steps between two measurements.
        progress: Whether to show bars.

    Raises:
        CheckpointError: the folder holds no run on a task.
        InvalidArgumentError: the name is no file name, or the step was not evaluated.
    """
    require_file_name(name)
    folder = Path(folder)
    facts = read_run(folder)
    settings = facts["settings"]
    if "task" not in settings:
        raise CheckpointError(f"{folder} is a run over a family, which cannot be exported; validate it instead")
    config = RuleConfig.from_dict(settings["rule"])
    unroll = build_unroll(settings["task"], config, seed=settings["trainer"]["seed"])
    evaluations = read_evaluations(folder)
    if step is None:
        seeds = settings["trainer"]["evaluation_seeds"]
        adam = tune(unroll.task, "adam", seeds, every=every, progress=progress)
        step = choose_step(evaluations, adam.validation.held_out.mean(1).min().item(), every)
    elif step not in (known := [each.step for each in evaluations]):
        raise InvalidArgumentError(f"outer step {step} was not evaluated; those of {folder} are {known}")
    meta = load_meta(folder, step, unroll)
    unroll.rule.load_state_dict(meta)
    last = max(facts["step"], 1)
    card = WeightsCard(
        name=name,
        description=description,
        rule=config.to_dict(),
        task=settings["task"],
        horizon=unroll.task.horizon,
        training={**settings["trainer"], "chosen_step": step, "steps_done": facts["step"]},
        seconds=round(facts["seconds"] * step / last, 1),
        commit=commit,
        package_version=__version__,
        aliases=aliases,
        results=measure_results(unroll, meta, REPORT_SEEDS, every=every, progress=progress),
        replay=record_replay(unroll, meta),
        limits=limits,
    )
    return save_weights(unroll.rule, card, out)
