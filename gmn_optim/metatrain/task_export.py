"""From a run on one task to a rule and its card, the outer step chosen on the task's validation set."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gmn_optim.errors import InvalidArgumentError
from gmn_optim.metatrain.baselines import tune
from gmn_optim.metatrain.export import choose_step, load_meta, measure_results, read_evaluations, record_replay
from gmn_optim.metatrain.runs import build_unroll, read_run
from gmn_optim.metatrain.unroll import Unroll
from gmn_optim.rule import RuleConfig
from gmn_optim.weights import Weights, WeightsCard

REPORT_SEEDS = (1, 2, 3, 4, 5)
"""Of the trainings that a card reports; neither meta-training nor validation saw them."""


def describe_task_run(
    folder: Path, about: Mapping[str, Any], step: int | None = None, *, every: int = 20, progress: bool = False
) -> Weights:
    """Return the rule of a run on a task at its best outer step, measured on the test set, its card without a hash.

    Args:
        folder: Of the run.
        about: Entries of the card that the run does not tell, its name among them.
        step: Outer step; None for the best on the validation set.
        every: Inner steps between two measurements.
        progress: Whether to show bars.

    Raises:
        CheckpointError: the folder holds no run.
        InvalidArgumentError: the outer step was not evaluated.
    """
    facts = read_run(folder)
    settings = facts["settings"]
    config = RuleConfig.from_dict(settings["rule"])
    unroll = build_unroll(settings["task"], config, seed=settings["trainer"]["seed"])
    chosen = _choose(folder, unroll, settings["trainer"]["evaluation_seeds"], step, every, progress)
    meta = load_meta(folder, chosen, unroll)
    unroll.rule.load_state_dict(meta)
    card = WeightsCard(
        rule=config.to_dict(),
        task=settings["task"],
        horizon=unroll.task.horizon,
        training={**settings["trainer"], "chosen_step": chosen, "steps_done": facts["step"]},
        seconds=round(facts["seconds"] * chosen / max(facts["step"], 1), 1),
        results=measure_results(unroll, meta, REPORT_SEEDS, every=every, progress=progress),
        replay=record_replay(unroll, meta),
        **about,
    )
    return Weights(unroll.rule, card)


def _choose(folder: Path, unroll: Unroll, seeds: tuple[int, ...], step: int | None, every: int, progress: bool) -> int:
    """Return the given outer step if it was evaluated, or else the best."""
    evaluations = read_evaluations(folder)
    if step is None:
        adam = tune(unroll.task, "adam", seeds, every=every, progress=progress)
        return choose_step(evaluations, adam.validation.held_out.mean(1).min().item(), every)
    if step not in (known := [each.step for each in evaluations]):
        raise InvalidArgumentError(f"outer step {step} was not evaluated; those of {folder} are {known}")
    return step
