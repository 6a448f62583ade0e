"""Which outer step of a run over a family becomes weights: the best one on the validation tasks."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from gmn_optim.errors import CheckpointError, InvalidArgumentError
from gmn_optim.metatrain.log import read_lines
from gmn_optim.rule import RuleConfig
from gmn_optim.rule.nominal import largest_element_of

Summary = Mapping[str, Any]
"""A line of ``validation.jsonl`` that tells means and figures of an outer step."""

LARGEST_RATIO = 1.05
"""Of final losses, against the nominal term, for an outer step to count as doing no harm."""


LEAST_SIZE = 0.25
"""Of a matrix at first, for exported weights to serve its model; of tasks that are drawn only SIREN has smaller."""


LARGEST_PACE = 0.6
"""Of a controller in exported weights: steps of at most 1.8 times the nominal ones."""


ANNEALING = 80.0
"""Of a controller in exported weights that was meta-trained without. Chosen on validation tasks and others of wide
inputs or few examples, on which a bound that stays lets it overfit before it is as good as tuned Adam."""


CONCENTRATION = 0.3
"""Of a controller in exported weights that was meta-trained without. With 1, final losses on few examples are lower
still, but it takes data that are easy to learn, of which few are left after some tens of steps, for data that are
memorized."""

EPOCHS = 4.0
"""Of a controller in exported weights that was meta-trained without. Chosen on nine tasks with about a thousand
examples, among 0.3 to 5: with fewer, fits of pictures slow down, which nothing is lost by memorizing."""


def as_used(config: RuleConfig, share: float) -> RuleConfig:
    """Return the configuration that meta-trained weights are used with, a share of the learned term.

    Example:
        >>> as_used(RuleConfig(nominal="kronecker_schedule_free", body="eigenbasis"), 0.5).share
        0.5
    """
    least_size, pace = LEAST_SIZE if config.in_eigenbasis else 0.0, min(config.largest_pace, LARGEST_PACE)
    annealing = config.annealing or (ANNEALING if config.body == "controller" else 0.0)
    concentration = config.concentration or (CONCENTRATION if config.body == "controller" else 0.0)
    epochs = config.epochs or (EPOCHS if config.body == "controller" else 0.0)
    of_body = {"largest_pace": pace, "annealing": annealing, "concentration": concentration, "epochs": epochs}
    bounded = config.largest_element or largest_element_of(config.nominal)
    return replace(config, share=share, least_size=least_size, largest_element=bounded, **of_body)


class Choice(NamedTuple):
    """An outer step and why it was taken.

    Attributes:
        summary: Of the outer step.
        reason: In words, for the card.
    """

    summary: Summary
    reason: str


def read_summaries(path: Path, step: int | None = None, share: float = 1.0) -> list[Summary]:
    """Return the summaries of one protocol and set of tasks, by outer step.

    Where the file holds several: those of the most tasks, of these the most outer steps, of these the last ones.

    Args:
        path: Of ``validation.jsonl``.
        step: An outer step that must be among them, if one of the protocols has it.
        share: Of the learned term that was measured.

    Raises:
        CheckpointError: nothing has been validated.
    """
    groups: dict[str, dict[int, Summary]] = {}
    for line in read_lines(path):
        if "speed" in line and line.get("share", 1.0) == share:
            key = json.dumps([line["settings"], sorted(line["tasks"])], sort_keys=True)
            groups[key] = {**groups.pop(key, {}), line["step"]: line}
    if not groups:
        raise CheckpointError(f"{path} holds no summary of an outer step; run 'gmn-optim validate' on its folder first")
    ranks = [
        (step in group, len(next(iter(group.values()))["tasks"]), len(group), number)
        for number, group in enumerate(groups.values())
    ]
    best = list(groups.values())[ranks.index(max(ranks))]
    return [best[each] for each in sorted(best)]


def choose_summary(summaries: Sequence[Summary], step: int | None = None) -> Choice:
    """Return the outer step that is fastest on the whole way against the nominal term at its best step size.

    Only outer steps whose worst ratio of final losses is at most :data:`LARGEST_RATIO` count, if there are any.

    Args:
        summaries: Of all outer steps that were measured.
        step: The outer step to take instead.

    Raises:
        InvalidArgumentError: ``step`` was not measured.

    Example:
        >>> summaries = [
        ...     {"step": 0, "speed": 1.0, "worst_ratio": 1.0},
        ...     {"step": 9, "speed": 1.5, "worst_ratio": 1.2},
        ... ]
        >>> choose_summary(summaries).summary["step"]
        0
    """
    if step is not None:
        found = {each["step"]: each for each in summaries}
        if step not in found:
            raise InvalidArgumentError(f"outer step {step} was not validated; those that were are {sorted(found)}")
        return Choice(found[step], f"outer step {step}, given by hand among {_count(summaries)}")
    harmless = [each for each in summaries if _ratio(each) <= LARGEST_RATIO]
    best = max(harmless or summaries, key=lambda each: (each["speed"], -_ratio(each)))
    bound = f"with a worst final-loss ratio against the nominal term of at most {LARGEST_RATIO}"
    share = f"the {len(harmless)} of {_count(summaries)}" if harmless else f"{_count(summaries)}, there being none"
    return Choice(best, f"outer step {best['step']}, the largest mean speed among {share} {bound}")


def _ratio(summary: Summary) -> float:
    """Return the worst ratio, infinity where it was not finite."""
    return math.inf if summary["worst_ratio"] is None else summary["worst_ratio"]


def _count(summaries: Sequence[Summary]) -> str:
    """Return the number of outer steps in words."""
    return "1 outer step" if len(summaries) == 1 else f"{len(summaries)} outer steps"
