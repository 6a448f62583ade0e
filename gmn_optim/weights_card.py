"""The card of weights: what they are, how they were made and what they reached, as JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gmn_optim.configuration import refuse_unknown_keys
from gmn_optim.errors import WeightsError

CARD_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class WeightsCard:
    """What a weights file is, how it was made and what it reached.

    Attributes:
        name: Name without suffix.
        description: One sentence.
        rule: Configuration of the update rule, see :class:`gmn_optim.rule.RuleConfig`.
        sha256: Of the safetensors file.
        task: Name of the meta-training task, empty for a family.
        family: Name of the family of meta-training tasks, empty for one task.
        horizon: Inner steps of a full training of the task, the most of a training in a family.
        training: Settings of the meta-training run and the outer step that was chosen.
        seconds: Time spent on meta-training up to that step.
        commit: Version control revision that the run was made with.
        package_version: Version of this package.
        licence: Of the weights.
        aliases: Further names, such as ``default``.
        results: Figures against tuned Adam and against the nominal term alone.
        replay: Inner training losses of the first steps with stated seeds, which loading code must reproduce; on the
            task of that name there, or else on the meta-training task.
        reproduction: The command line of the run, and what its first outer steps logged.
        limits: Known limits, a sentence each.
        format: Version of this layout.

    Example:
        >>> from gmn_optim.rule import RuleConfig
        >>> card = WeightsCard(name="mine", description="A rule of mine.", rule=RuleConfig(body=None).to_dict())
        >>> WeightsCard.from_json(card.to_json()) == card
        True
    """

    name: str
    description: str
    rule: Mapping[str, Any]
    sha256: str = ""
    task: str = ""
    family: str = ""
    horizon: int = 0
    training: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    commit: str = ""
    package_version: str = ""
    licence: str = "MIT"
    aliases: tuple[str, ...] = ()
    results: Mapping[str, Any] = field(default_factory=dict)
    replay: Mapping[str, Any] = field(default_factory=dict)
    reproduction: Mapping[str, Any] = field(default_factory=dict)
    limits: tuple[str, ...] = ()
    format: int = CARD_FORMAT

    def to_json(self) -> str:
        """Return the card as the text of its file."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, path: Path | str = "card") -> "WeightsCard":
        """Return the card that :meth:`to_json` wrote.

        Raises:
            WeightsError: the text is no card, or one of a newer version.
        """
        try:
            values = json.loads(text, parse_constant=_refuse_constant)
            if not isinstance(values, dict):
                raise TypeError("a card is a JSON object")
            if values.get("format") != CARD_FORMAT:
                raise TypeError(f"format is {values.get('format')!r}, this version reads {CARD_FORMAT}")
            refuse_unknown_keys("the card", values, cls)
            _require_types(values)
            values["aliases"], values["limits"] = tuple(values.get("aliases", ())), tuple(values.get("limits", ()))
            return cls(**values)
        except (ValueError, TypeError, RecursionError) as error:
            raise WeightsError(f"{path} is no usable weights card: {error}. Get the file anew.") from error


_CARD_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(
        ("name", "description", "sha256", "task", "family", "commit", "package_version", "licence"), (str,)
    ),
    **dict.fromkeys(("training", "results", "replay", "reproduction"), (dict,)),
    **dict.fromkeys(("aliases", "limits"), (list,)),
    **{"horizon": (int,), "seconds": (int, float), "format": (int,)},
}


def _require_types(values: Mapping[str, Any]) -> None:
    """Raise ``TypeError`` if a value of a card has another JSON type than its field."""
    for key, value in values.items():
        if key == "rule":  # checked where it is built
            continue
        if type(value) not in _CARD_TYPES[key] or (
            type(value) is list and any(type(each) is not str for each in value)
        ):
            raise TypeError(f"{key} is {value!r:.60}, of another type than a card's")


def _refuse_constant(name: str) -> None:
    """Refuse what JSON does not have: NaN and infinities."""
    raise ValueError(f"{name} is no JSON number")
