"""Weights files: meta-parameters in safetensors beside a card in JSON. Nothing in them is ever executed."""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from gmn_optim.errors import InvalidArgumentError, UnknownNameError, WeightsError
from gmn_optim.registry import unknown_name_message
from gmn_optim.rule import RuleConfig, UpdateRule
from gmn_optim.weights_card import CARD_FORMAT as CARD_FORMAT
from gmn_optim.weights_card import WeightsCard as WeightsCard


class Weights(NamedTuple):
    """A meta-trained update rule and the card that tells what it is.

    Example:
        >>> load_weights("default").rule.config.arm
        'kronecker_schedule_free+controller'
    """

    rule: UpdateRule
    card: WeightsCard

    @property
    def identity(self) -> str:
        """Return name and start of the hash, which a saved optimizer state must match."""
        return f"{self.card.name}@{self.card.sha256[:12]}"


def list_weights(pattern: str = "*") -> list[str]:
    """Return the names of the weights that ship with the package and match a shell-style pattern.

    Example:
        >>> "fashion-mnist-mlp.adam-gmn" in list_weights("*-gmn")
        True
    """
    return sorted(path.stem for path in _pretrained_folder().glob("*.json") if fnmatchcase(path.stem, pattern))


def load_weights(name_or_path: str | Path) -> Weights:
    """Return shipped weights by name or alias, or those of a ``.safetensors`` file with its card beside it.

    Args:
        name_or_path: A name from :func:`list_weights`, the alias ``default``, or a path.

    Raises:
        UnknownNameError: no shipped weights have this name.
        WeightsError: the file or its card is missing, damaged, do not match, or hold values that are not finite.

    Example:
        >>> load_weights("default").card.licence
        'MIT'
    """
    path = _resolve(name_or_path)
    card_path = path.with_suffix(".json")
    for each, what in ((path, "weights"), (card_path, "card")):
        if not each.is_file():
            raise WeightsError(
                f"{what} file {each} does not exist; weights are a .safetensors file beside a .json card"
            )
    content = path.read_bytes()
    card = WeightsCard.from_json(_read_text(card_path), card_path)
    found = hashlib.sha256(content).hexdigest()
    if found != card.sha256:
        raise WeightsError(
            f"{path} has sha256 {found[:12]}..., its card says {card.sha256[:12]}...: the file is damaged or "
            "belongs to another card. Get both anew."
        )
    return Weights(_build_rule(card, _read_tensors(content, path), path), card)


def save_weights(rule: UpdateRule, card: WeightsCard, folder: str | Path) -> Weights:
    """Write ``<card.name>.safetensors`` and its card into a folder; return the weights with the finished card.

    Raises:
        WeightsError: a meta-parameter is not finite.
        InvalidArgumentError: the card describes another rule.

    Example:
        >>> import tempfile
        >>> from gmn_optim.rule import RuleConfig, UpdateRule
        >>> config = RuleConfig(body=None)
        >>> card = WeightsCard(name="plain", description="Momentum alone.", rule=config.to_dict())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = save_weights(UpdateRule(config), card, folder)
        ...     load_weights(f"{folder}/plain.safetensors").identity == saved.identity
        True
    """
    if RuleConfig.from_dict(card.rule) != rule.config:
        raise InvalidArgumentError(
            f"card {card.name!r} describes the rule {card.rule}, given is {rule.config.to_dict()}"
        )
    require_file_name(card.name)
    tensors = {name: value.detach().float().contiguous() for name, value in rule.named_parameters()}
    _require_finite(tensors, card.name)
    content = save_tensors(tensors)
    finished = WeightsCard(**{**asdict(card), "sha256": hashlib.sha256(content).hexdigest()})
    text = finished.to_json()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{card.name}.safetensors").write_bytes(content)
    (folder / f"{card.name}.json").write_text(text, encoding="utf-8")
    return Weights(rule, finished)


def require_file_name(name: str) -> None:
    """Raise :class:`InvalidArgumentError` if a name of weights would not be the name of a file in the given folder.

    Example:
        >>> require_file_name("../mine")
        Traceback (most recent call last):
            ...
        gmn_optim.errors.InvalidArgumentError: name is '../mine'; expected letters, digits, '_', '.', '+' and '-'
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", str(name)):
        raise InvalidArgumentError(f"name is {name!r}; expected letters, digits, '_', '.', '+' and '-'")


def _pretrained_folder() -> Path:
    """Return the folder of shipped weights: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).parent
    installed, checkout = package / "pretrained", package.parent / "pretrained"
    return installed if installed.is_dir() else checkout


def _resolve(name_or_path: str | Path) -> Path:
    """Return the path of the safetensors file that is meant."""
    if isinstance(name_or_path, Path) or name_or_path.endswith(".safetensors"):
        return Path(name_or_path)
    names = list_weights()
    if name_or_path in names:
        return _pretrained_folder() / f"{name_or_path}.safetensors"
    aliases = {alias: name for name in names for alias in _aliases(name)}
    if name_or_path in aliases:
        return _pretrained_folder() / f"{aliases[name_or_path]}.safetensors"
    message = unknown_name_message("weights file", name_or_path, [*aliases, *names])
    raise UnknownNameError(f"{message} A file of your own is given by its path, ending in .safetensors.")


def _aliases(name: str) -> tuple[str, ...]:
    """Return the aliases that a shipped card claims."""
    path = _pretrained_folder() / f"{name}.json"
    return WeightsCard.from_json(_read_text(path), path).aliases


def _read_text(path: Path) -> str:
    """Return a card's text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise WeightsError(f"{path} is no usable weights card: {error}. Get the file anew.") from error


def _read_tensors(content: bytes, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file."""
    try:
        return load_tensors(content)
    except SafetensorError as error:
        raise WeightsError(
            f"{path} is no readable safetensors file ({error}): damaged or cut short. Get it anew."
        ) from error


def _build_rule(card: WeightsCard, tensors: Mapping[str, Tensor], path: Path) -> UpdateRule:
    """Return the rule of a card with these meta-parameters, after checking that they fit."""
    try:
        config = RuleConfig.from_dict(card.rule)
    except (InvalidArgumentError, UnknownNameError, TypeError) as error:
        raise WeightsError(f"the card of {path} describes a rule that cannot be built: {error}") from error
    with torch.device("meta"):  # sizes that no file backs up take no memory
        wanted = {name: value.shape for name, value in UpdateRule(config).named_parameters()}
    faults = [f"{name} is missing" for name in wanted if name not in tensors]
    faults += [f"{name} is unexpected" for name in tensors if name not in wanted]
    faults += [
        f"{name} has shape {tuple(tensors[name].shape)}, the card's rule has {tuple(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    faults += [f"{name} is {value.dtype}" for name, value in tensors.items() if not value.is_floating_point()]
    if faults:
        raise WeightsError(f"{path} does not fit its card: {'; '.join(faults[:5])} ({len(faults)} faults in all)")
    tensors = {name: value.float() for name, value in tensors.items()}
    _require_finite(tensors, path)
    with torch.random.fork_rng(devices=[]):
        rule = UpdateRule(config)
    rule.load_state_dict(tensors)
    return rule.requires_grad_(False)


def _require_finite(tensors: Mapping[str, Tensor], what: object) -> None:
    """Raise if a value is not finite."""
    faults = [name for name, value in tensors.items() if not math.isfinite(value.double().sum().item())]
    if faults:
        raise WeightsError(f"{what} holds values that are not finite, in {', '.join(faults)}; it cannot be used")
