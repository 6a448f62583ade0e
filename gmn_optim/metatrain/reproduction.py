"""What lets anybody check a run over a family: its command line and what its first outer steps logged."""

import shlex
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from gmn_optim.metatrain.family_config import LATER_SETTINGS, FamilyConfig
from gmn_optim.metatrain.log import LOG, read_lines, rounded
from gmn_optim.metatrain.outer_loop import meta_path
from gmn_optim.metatrain.runs import kept_steps
from gmn_optim.nn import GradMetaNetConfig
from gmn_optim.rule import RuleConfig

RECORDED_STEPS = 200
"""Outer steps whose log a card keeps."""

_HIDDEN = ("staggered", "betas", "evaluation_seeds")
"""Settings of the trainer without an option."""


def record_reproduction(folder: Path, settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the command line of a run, its rule as it was trained, and losses and norms of its first outer steps.

    Args:
        folder: Of a run over a family.
        settings: As its checkpoint tells them.
        name: Of the weights; the command line makes a folder of that name.
    """
    command = command_line(settings, f"runs/{name}")
    rule = RuleConfig.from_dict(settings["rule"]).to_dict()
    return {"command": command, "rule": rule, **read_first_steps(folder, RECORDED_STEPS)}


def read_first_steps(folder: Path, last: int) -> dict[str, Any]:
    """Return what the first outer steps of a run came to.

    Args:
        folder: Of the run.
        last: Outer step.

    Returns:
        ``losses`` and ``gradient_norms`` of outer steps 1, 2, ... and ``meta_norms``, the norm of all meta-parameters
        by outer step at which they were kept, with six digits, None where not finite.
    """
    lines = {line["step"]: line for line in read_lines(folder / LOG) if 1 <= line["step"] <= last and "loss" in line}
    logged = [lines[step] for step in sorted(lines)]
    return {
        "losses": [line["loss"] for line in logged],
        "gradient_norms": [line["gradient_norm"] for line in logged],
        "meta_norms": {str(step): _meta_norm(folder, step) for step in kept_steps(folder) if step <= last},
    }


def command_line(settings: Mapping[str, Any], folder: str) -> str:
    """Return the command that makes a run over a family of these settings, empty if no options give them.

    Args:
        settings: As the checkpoint of a run tells them: ``family``, ``rule`` and ``trainer``.
        folder: For the new run.

    Example:
        >>> from dataclasses import asdict
        >>> settings = {"family": "default", "rule": RuleConfig().to_dict(), "trainer": asdict(FamilyConfig(lr=0.5))}
        >>> words = command_line(settings, "runs/mine").split()
        >>> words[:4], words[words.index("--lr") + 1]
        (['gmn-optim', 'meta-train', '--family', 'default'], '0.5')
    """
    rule = RuleConfig.from_dict(settings["rule"])
    if _has_no_options(rule, settings["trainer"]):
        return ""
    words = ["gmn-optim", "meta-train", "--family", settings["family"], "--folder", folder]
    return shlex.join([*words, *_rule_words(rule), *_trainer_words(settings["trainer"])])


def _has_no_options(rule: RuleConfig, trainer: Mapping[str, Any]) -> bool:
    """Return whether settings that only Python can change are changed."""
    default, net, plain = FamilyConfig(), rule.gradmetanet, GradMetaNetConfig()
    own = ("width", "set_layers", "neuron_layers", "neuron_numbers")
    hidden = [name for name in vars(plain) if name not in own] if net else []
    return (
        any(_as_list(trainer[name]) != _as_list(getattr(default, name)) for name in _HIDDEN)
        or any(getattr(rule, name) != getattr(RuleConfig(), name) for name in ("guard", "share", "least_size"))
        or any(getattr(net, name) != getattr(plain, name) for name in hidden)
    )


def _rule_words(rule: RuleConfig) -> list[str]:
    """Return the options of a rule."""
    arm = "nominal" if rule.body is None else rule.body + ("+gmn" if rule.gradmetanet else "")
    words = ["--arm", arm, "--nominal", rule.nominal, "--memory", rule.memory]
    names = ["data_points", "width", "depth", "decay", "beta", "follow_every", "largest_element"]
    names += ["setpoint", "largest_pace", "annealing", "concentration", "epochs"]
    for name in (*names, *(["alpha"] if rule.alpha is not None else [])):
        words += [_option(name), str(getattr(rule, name))]
    if net := rule.gradmetanet:
        for name in ("width", "set_layers", "neuron_layers"):
            words += [_option(f"gmn_{name}"), str(getattr(net, name))]
        words += [] if net.neuron_numbers else ["--no-neuron-numbers"]
    return words + [_option(name) for name in ("gated", "scheduled") if getattr(rule, name)]


def _trainer_words(trainer: Mapping[str, Any]) -> list[str]:
    """Return the options of the trainer."""
    words, trainer = [], {**LATER_SETTINGS, **trainer}
    for setting in fields(FamilyConfig):
        name, value = setting.name, trainer[setting.name]
        if name in _HIDDEN:
            continue
        if isinstance(value, bool):
            words.append(_option(name if value else f"no_{name}"))
        else:
            words += [_option(name), *(value if isinstance(value, list | tuple) else [str(value)])]
    return words


def _option(name: str) -> str:
    """Return the option of a setting."""
    return "--" + name.replace("_", "-")


def _as_list(value: Any) -> Any:
    """Return a tuple as JSON would give it back."""
    return list(value) if isinstance(value, tuple) else value


def _meta_norm(folder: Path, step: int) -> float | None:
    """Return the norm of all meta-parameters that were kept at an outer step."""
    squares = [value.double().square().sum() for value in load_file(meta_path(folder, step)).values()]
    return rounded([torch.stack(squares).sum().sqrt().item()])[0]
