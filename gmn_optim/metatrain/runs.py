"""Meta-training runs as folders: how one is described, and what its folder tells of it."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from gmn_optim.errors import CheckpointError
from gmn_optim.metatrain.outer_loop import CHECKPOINT
from gmn_optim.metatrain.unroll import Unroll
from gmn_optim.rule import RuleConfig, UpdateRule
from gmn_optim.tasks import tasks


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


def kept_steps(folder: Path) -> list[int]:
    """Return the outer steps whose meta-parameters a run kept."""
    found = (re.fullmatch(r"meta-(\d+)\.safetensors", path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)
