"""Verification of weights: what their card recorded, computed anew."""

import math
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from gmn_optim.errors import InvalidArgumentError, WeightsError
from gmn_optim.metatrain.export import replay
from gmn_optim.metatrain.family_config import LATER_SETTINGS, FamilyConfig
from gmn_optim.metatrain.family_trainer import FamilyTrainer
from gmn_optim.metatrain.reproduction import read_first_steps
from gmn_optim.metatrain.runs import build_rule
from gmn_optim.metatrain.unroll import Unroll
from gmn_optim.rule import RuleConfig
from gmn_optim.tasks import families, tasks
from gmn_optim.weights import Weights, WeightsCard

TOLERANCE = 1e-3
"""Largest relative deviation: other machines and other numbers of threads round differently."""

NORM_TOLERANCE = 5e-2
"""The same for norms of meta-gradients. In a training that has failed, pairs differ by rounding errors alone, which
standardised estimates count like any other difference."""

JUDGED_STEPS = 3
"""Outer steps that must match; differences in rounding grow with the inner steps, so that later ones may not."""


class Recomputed(NamedTuple):
    """A number of a card and the same number computed anew.

    Attributes:
        what: Its name.
        step: Inner step of a replay, outer step of meta-training.
        recorded: On the card, None where it was not finite.
        found: Now.
        judged: Whether it must match.

    Example:
        >>> Recomputed("loss", 1, 0.5, 0.5002, True).matches, Recomputed("loss", 1, 0.5, 0.7, True).matches
        (True, False)
    """

    what: str
    step: int
    recorded: float | None
    found: float | None
    judged: bool

    @property
    def deviation(self) -> float:
        """Return the deviation, relative to the recorded number or to 1 for the logarithm that a meta-loss is."""
        if self.recorded is None or self.found is None:
            return 0.0 if self.recorded is self.found else math.inf
        size = max(abs(self.recorded), 1.0 if self.what == "meta-loss" else 1e-30)
        return abs(self.found - self.recorded) / size

    @property
    def matches(self) -> bool:
        """Return whether the number is within the tolerance, or is only shown."""
        allowed = NORM_TOLERANCE if self.what == "meta-gradient norm" else TOLERANCE
        return not self.judged or self.deviation <= allowed


def verify_replay(weights: Weights) -> list[Recomputed]:
    """Return the training losses of the recorded inner training, and those of these weights now.

    Raises:
        WeightsError: the card records none.

    Example:
        >>> from gmn_optim.weights import load_weights
        >>> all(each.matches for each in verify_replay(load_weights("default")))
        True
    """
    card = weights.card
    recorded = card.replay.get("losses", [])
    name = card.replay.get("task", card.task)
    if not recorded or not name:
        raise WeightsError(f"the card of {card.name} records no inner training to replay; export the run anew")
    unroll = Unroll(tasks[name](), weights.rule)
    found = replay(unroll, unroll.meta_parameters(), card.replay.get("seed", 0), len(recorded)).tolist()
    pairs = zip(recorded, found, strict=True)
    return [Recomputed("training loss", step, *pair, True) for step, pair in enumerate(pairs, 1)]


def verify_outer_steps(card: WeightsCard, steps: int, progress: bool = False) -> list[Recomputed]:
    """Run the first outer steps of meta-training anew in a temporary folder, and return what the card says of them.

    Args:
        card: Of weights of a run over a family.
        steps: Outer steps.
        progress: Whether to show a bar.

    Raises:
        InvalidArgumentError: the card records fewer outer steps, or none.
        UnknownNameError: no such family here.
        WeightsError: the card lacks the rule or a setting of the run.
    """
    known = min(len(card.reproduction.get(key, [])) for key in ("losses", "gradient_norms"))
    if not card.family or not 1 <= steps <= known:
        raise InvalidArgumentError(
            f"{steps} outer steps asked for, the card of {card.name} records {known}; only runs over a family have some"
        )
    with tempfile.TemporaryDirectory() as folder:
        _retrain(card, Path(folder), steps, progress)
        return _compare(card.reproduction, read_first_steps(Path(folder), steps), steps)


def trainer_config(card: WeightsCard) -> FamilyConfig:
    """Return the trainer's settings that a card records.

    Raises:
        InvalidArgumentError: they make no sense.
        WeightsError: one is missing.

    Example:
        >>> from dataclasses import asdict, replace
        >>> training = {**asdict(FamilyConfig(lr=0.5)), "chosen_step": 100}
        >>> trainer_config(WeightsCard(name="a", description="b", rule={}, training=training)).lr
        0.5
    """
    names = [setting.name for setting in fields(FamilyConfig)]
    training = {**LATER_SETTINGS, **card.training}
    if missing := [name for name in names if name not in training]:
        raise WeightsError(f"the card of {card.name} lacks the settings {', '.join(missing)}; export the run anew")
    values = {name: training[name] for name in names}
    return FamilyConfig(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def _retrain(card: WeightsCard, folder: Path, steps: int, progress: bool) -> None:
    """Take the first outer steps of a card's run."""
    config = trainer_config(card)
    if "rule" not in card.reproduction:
        raise WeightsError(f"the card of {card.name} lacks the rule as it was meta-trained; export the run anew")
    # the card's own rule may hold what was chosen after meta-training
    rule = build_rule(RuleConfig.from_dict(card.reproduction["rule"]), seed=config.seed)
    trainer = FamilyTrainer(families[card.family](), rule, config, folder)
    trainer.run(steps, progress=progress)


def _compare(recorded: Mapping[str, Any], found: Mapping[str, Any], last: int) -> list[Recomputed]:
    """Return what was recorded up to an outer step beside what was found; a run that paused kept more norms."""
    rows = []
    for what, key in (("meta-loss", "losses"), ("meta-gradient norm", "gradient_norms")):
        pairs = zip(recorded[key][:last], found[key], strict=True)
        rows += [Recomputed(what, step, *pair, step <= JUDGED_STEPS) for step, pair in enumerate(pairs, 1)]
    kept = found["meta_norms"]
    both = [text for text in recorded.get("meta_norms", {}) if text in kept]
    norms = [(int(text), recorded["meta_norms"][text], kept[text]) for text in both]
    rows += [Recomputed("meta-parameter norm", step, *pair, step <= JUDGED_STEPS) for step, *pair in norms]
    return sorted(rows, key=lambda row: row.step)
