"""From a run over a family to a rule and its card, the outer step chosen on the validation tasks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gmn_optim.metatrain.choice import Choice, as_used, choose_summary, read_summaries
from gmn_optim.metatrain.export import load_meta, record_replay
from gmn_optim.metatrain.log import LOG, read_lines
from gmn_optim.metatrain.reproduction import record_reproduction
from gmn_optim.metatrain.runs import build_unroll, read_run
from gmn_optim.metatrain.validation import VALIDATION
from gmn_optim.rule import RuleConfig
from gmn_optim.weights import Weights, WeightsCard

REPLAY_TASK = "validation-letters-mlp"
"""On data that ship with the package, and small."""


def describe_family_run(folder: Path, about: Mapping[str, Any], step: int | None = None, share: float = 1.0) -> Weights:
    """Return the rule of a run over a family at its best outer step, with a card that has no hash yet.

    Args:
        folder: Of the run; ``gmn-optim validate`` has measured it.
        about: Entries of the card that the run does not tell, its name among them.
        step: Outer step; None for the best on the validation tasks.
        share: Of the learned term; it was validated.

    Raises:
        CheckpointError: the folder holds no run, or nothing has been validated.
        InvalidArgumentError: the outer step was not validated.
    """
    facts = read_run(folder)
    settings = facts["settings"]
    config = as_used(RuleConfig.from_dict(settings["rule"]), share)
    choice = choose_summary(read_summaries(folder / VALIDATION, step, share), step)
    chosen = choice.summary["step"]
    unroll = build_unroll(REPLAY_TASK, config, seed=settings["trainer"]["seed"])
    meta = load_meta(folder, chosen, unroll)
    unroll.rule.load_state_dict(meta)
    card = WeightsCard(
        rule=config.to_dict(),
        family=settings["family"],
        horizon=settings["trainer"]["longest_horizon"],
        training={**settings["trainer"], "chosen_step": chosen, "steps_done": facts["step"]},
        seconds=_seconds_until(folder, chosen),
        results=_results(choice),
        replay={"task": REPLAY_TASK, **record_replay(unroll, meta)},
        reproduction=record_reproduction(folder, settings, about["name"]),
        **about,
    )
    return Weights(unroll.rule, card)


def _results(choice: Choice) -> dict[str, Any]:
    """Return a card's figures: the summary of the chosen outer step, and why it was chosen."""
    figures = {key: value for key, value in choice.summary.items() if key not in ("step", "share", "settings")}
    return {"choice": choice.reason, "settings": choice.summary["settings"], **figures}


def _seconds_until(folder: Path, step: int) -> float:
    """Return the time that a run took to an outer step."""
    found = [line["seconds"] for line in read_lines(folder / LOG) if "loss" in line and line["step"] <= step]
    return float(found[-1]) if found else 0.0
