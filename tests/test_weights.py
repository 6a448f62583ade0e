"""Weights come back bit by bit or not at all, and a file that cannot be used is refused with the reason."""

import hashlib
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from gmn_optim import weights
from gmn_optim.errors import GMNError, InvalidArgumentError, UnknownNameError, WeightsError
from gmn_optim.rule import RuleConfig, UpdateRule
from gmn_optim.weights import CARD_FORMAT, WeightsCard, list_weights, load_weights, save_weights
from tests import tables

ARMS = {**tables.ARMS, "ds": RuleConfig(nominal="adam", gated=True, scheduled=True, width=5, depth=2)}


def make_rule(arm: str = "slots") -> UpdateRule:
    """Return a rule with random meta-parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rule = UpdateRule(ARMS[arm])
        for parameter in rule.parameters():
            nn.init.normal_(parameter)
    return rule


def make_card(arm: str = "slots", **values: object) -> WeightsCard:
    """Return a card that describes an arm."""
    return WeightsCard(**{"name": "test", "description": "For tests.", "rule": ARMS[arm].to_dict(), **values})


@pytest.fixture(name="saved")
def fixture_saved(tmp_path: Path) -> Path:
    """Return the path of weights that were just saved."""
    save_weights(make_rule(), make_card(), tmp_path)
    return tmp_path / "test.safetensors"


@pytest.fixture(name="shipped")
def fixture_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that stands for the weights in the package."""
    monkeypatch.setattr(weights, "_pretrained_folder", lambda: tmp_path)
    for name, aliases in (("images.ds", ()), ("images.slots", ("default", "best")), ("text.ds", ())):
        arm = name.split(".")[1]
        save_weights(make_rule(arm), make_card(arm, name=name, aliases=aliases), tmp_path)
    return tmp_path


def rewrite_card(path: Path, **changes: object) -> None:
    """Change entries of the card beside a weights file."""
    card = path.with_suffix(".json")
    card.write_text(json.dumps({**json.loads(card.read_text()), **changes}))


def rewrite_content(path: Path, content: bytes) -> None:
    """Put other content into a weights file, with its hash on the card."""
    path.write_bytes(content)
    rewrite_card(path, sha256=hashlib.sha256(content).hexdigest())


def rewrite_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a weights file, with its hash on the card."""
    tensors = load_file(path)
    change(tensors)
    rewrite_content(path, save(tensors))


# ---------------------------------------------------------------------- there and back


@pytest.mark.parametrize("arm", ARMS)
def test_weights_come_back_bit_by_bit(tmp_path: Path, arm: str) -> None:
    rule = make_rule(arm)
    saved = save_weights(rule, make_card(arm), tmp_path)
    loaded = load_weights(tmp_path / "test.safetensors")
    found, expected = dict(loaded.rule.named_parameters()), dict(rule.named_parameters())
    assert found.keys() == expected.keys() and loaded.rule.config == rule.config
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert not any(parameter.requires_grad for parameter in loaded.rule.parameters())
    assert loaded.card == saved.card and loaded.identity == saved.identity


def test_saving_again_writes_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    loaded = load_weights(saved)
    save_weights(loaded.rule, loaded.card, tmp_path / "again")
    for suffix in (".safetensors", ".json"):
        assert (tmp_path / "again" / f"test{suffix}").read_bytes() == saved.with_suffix(suffix).read_bytes()


def test_a_path_may_be_a_string_and_a_folder_is_made(tmp_path: Path) -> None:
    save_weights(make_rule(), make_card(), str(tmp_path / "new" / "folder"))
    assert load_weights(str(tmp_path / "new" / "folder" / "test.safetensors")).card.name == "test"


def test_double_precision_is_saved_in_single(tmp_path: Path) -> None:
    rule = make_rule()
    save_weights(make_rule().double(), make_card(), tmp_path)
    for found, expected in zip(
        load_weights(tmp_path / "test.safetensors").rule.parameters(), rule.parameters(), strict=True
    ):
        assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_the_identity_is_the_name_and_the_start_of_the_hash(saved: Path) -> None:
    assert load_weights(saved).identity == f"test@{hashlib.sha256(saved.read_bytes()).hexdigest()[:12]}"


def test_a_card_survives_json_with_all_that_it_says() -> None:
    card = make_card(
        aliases=("default",), limits=("None known.",), results={"steps": [1, 2]}, seconds=0.5, licence="MIT"
    )
    assert WeightsCard.from_json(card.to_json()) == card


def test_missing_entries_of_a_card_take_their_defaults() -> None:
    text = json.dumps({"name": "n", "description": "d", "rule": {}, "format": CARD_FORMAT})
    assert WeightsCard.from_json(text) == WeightsCard(name="n", description="d", rule={})


def test_the_global_random_state_stays_as_it_is(saved: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    load_weights(saved)
    save_weights(make_rule(), make_card(), saved.parent)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------- names


def test_shipped_weights_are_listed_in_order_and_by_pattern(shipped: Path) -> None:
    assert list_weights() == ["images.ds", "images.slots", "text.ds"]
    assert list_weights("*.ds") == ["images.ds", "text.ds"] and list_weights("nothing*") == []


@pytest.mark.parametrize(
    ("given", "name"),
    [("images.ds", "images.ds"), ("text.ds", "text.ds"), ("default", "images.slots"), ("best", "images.slots")],
)
def test_shipped_weights_load_by_name_and_alias(shipped: Path, given: str, name: str) -> None:
    assert load_weights(given).card.name == name


NEAR = {
    "images.dss": "Did you mean 'images.ds'",
    "defualt": "Did you mean 'default'",
    "image": "'images.ds'",
    "qqq": "Known: best, default, images.ds, images.slots, text.ds",
    "model.pt": "given by its path, ending in .safetensors",
    "": "Known: best",
}


@pytest.mark.parametrize("given", NEAR)
def test_an_unknown_name_is_refused_with_near_matches(shipped: Path, given: str) -> None:
    with pytest.raises(UnknownNameError, match=re.escape(NEAR[given])) as caught:
        load_weights(given)
    assert f"no weights file is named {given!r}" in str(caught.value)


# ---------------------------------------------------------------------- files that cannot be used


def flip(path: Path, place: int) -> None:
    """Flip the bits of one byte."""
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)


def of_another(path: Path) -> None:
    """Put the card of other weights beside the file."""
    save_weights(make_rule("ds"), make_card("ds", name="other"), path.parent)
    path.with_suffix(".json").write_bytes((path.parent / "other.json").read_bytes())


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no file": (lambda path: path.unlink(), "weights file .*test.safetensors does not exist"),
    "no card": (lambda path: path.with_suffix(".json").unlink(), "card file .*test.json does not exist"),
    "cut short": (
        lambda path: path.write_bytes(path.read_bytes()[:-7]),
        "the file is damaged or belongs to another card",
    ),
    "empty": (lambda path: path.write_bytes(b""), "the file is damaged"),
    "one byte flipped in the header": (lambda path: flip(path, 20), "the file is damaged"),
    "one byte flipped at the end": (lambda path: flip(path, -1), "the file is damaged"),
    "card of another file": (of_another, "belongs to another card"),
    "wrong hash": (lambda path: rewrite_card(path, sha256="0" * 64), "its card says 000000000000"),
    "no hash": (lambda path: rewrite_card(path, sha256=""), "has sha256"),
    "cut short, hash put right": (
        lambda path: rewrite_content(path, path.read_bytes()[:-7]),
        "no readable safetensors file .*damaged or cut short",
    ),
    "a pickle, hash put right": (
        lambda path: rewrite_content(path, pickle.dumps({"w": 1})),
        "no readable safetensors file",
    ),
    "card is no JSON": (lambda path: path.with_suffix(".json").write_text("{name: test"), "no usable weights card"),
    "card is a JSON list": (lambda path: path.with_suffix(".json").write_text("[1]"), "a card is a JSON object"),
    "card is no text": (lambda path: path.with_suffix(".json").write_bytes(b"\xff\xfe\x00"), "no usable weights card"),
    "card is empty": (lambda path: path.with_suffix(".json").write_text(""), "no usable weights card"),
    "card of a newer version": (
        lambda path: rewrite_card(path, format=CARD_FORMAT + 1),
        f"format is {CARD_FORMAT + 1}, this version reads {CARD_FORMAT}",
    ),
    "card without version": (lambda path: rewrite_card(path, format=None), "format is None"),
    "card with unknown keys": (lambda path: rewrite_card(path, colour=1, size=2), r"unknown keys \['colour', 'size'\]"),
    "card without a name": (
        lambda path: path.with_suffix(".json").write_text(json.dumps({"format": CARD_FORMAT})),
        "no usable weights card.*name",
    ),
    "hash that is no text": (lambda path: rewrite_card(path, sha256=None), "sha256|no usable weights card"),
    "rule with unknown keys": (
        lambda path: rewrite_card(path, rule={"colour": 1}),
        "rule that cannot be built.*colour",
    ),
    "rule with unknown keys of its network": (
        lambda path: rewrite_card(path, rule={"gradmetanet": {"colour": 1}}),
        "rule that cannot be built.*colour",
    ),
    "rule of an unknown kind": (lambda path: rewrite_card(path, rule={"body": "unf"}), "no body is named 'unf'"),
    "rule with a senseless value": (
        lambda path: rewrite_card(path, rule={"width": 0}),
        "width = 0 must be whole, 1 to 4096",
    ),
    "rule with a value of another type": (lambda path: rewrite_card(path, rule={"width": "wide"}), "cannot be built"),
    "rule that is nothing": (lambda path: rewrite_card(path, rule=None), "cannot be built"),
    "a tensor missing": (
        lambda path: rewrite_tensors(path, lambda tensors: tensors.pop("alpha.raw")),
        r"does not fit its card: alpha.raw is missing \(1 faults in all\)",
    ),
    "a tensor too many": (
        lambda path: rewrite_tensors(path, lambda tensors: tensors.update(gamma=torch.zeros(2))),
        "gamma is unexpected",
    ),
    "a tensor of another shape": (
        lambda path: rewrite_tensors(path, lambda tensors: tensors.update({"beta.raw": torch.zeros(3)})),
        r"beta.raw has shape \(3,\), the card's rule has \(\)",
    ),
    "a NaN": (
        lambda path: rewrite_tensors(path, lambda t: t["body.output.bias"].fill_(torch.nan)),
        "not finite, in body.output.bias",
    ),
    "an infinity": (
        lambda path: rewrite_tensors(path, lambda t: t["alpha.raw"].fill_(-torch.inf)),
        "not finite, in alpha.raw",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_cannot_be_used_is_refused_with_the_reason(saved: Path, damage: str) -> None:
    change, reason = DAMAGE[damage]
    change(saved)
    with pytest.raises(WeightsError, match=reason) as caught:
        load_weights(saved)
    assert "test" in str(caught.value) and isinstance(caught.value, ValueError) and isinstance(caught.value, GMNError)


def test_all_tensors_that_do_not_fit_are_listed_at_once(saved: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["alpha.raw"], tensors["nominal.momentum.raw"]
        tensors["extra"] = torch.zeros(1)
        tensors["beta.raw"] = torch.zeros(2)

    rewrite_tensors(saved, change)
    with pytest.raises(WeightsError, match=r"\(4 faults in all\)") as caught:
        load_weights(saved)
    for name in ("alpha.raw", "nominal.momentum.raw", "extra", "beta.raw"):
        assert name in str(caught.value)


def test_many_faults_are_counted(saved: Path) -> None:
    count = len(load_file(saved))
    rewrite_tensors(saved, lambda tensors: [tensors.pop(name) for name in list(tensors)])
    with pytest.raises(WeightsError, match=rf"\({count} faults in all\)"):
        load_weights(saved)


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("writer", [pickle.dump, torch.save])
def test_a_pickle_is_never_executed(saved: Path, writer: Callable[[object, object], None]) -> None:
    sprung = saved.parent / "sprung"
    with saved.open("wb") as file:
        writer({"weights": Trap(sprung)}, file)
    rewrite_content(saved, saved.read_bytes())
    with pytest.raises(WeightsError, match="no readable safetensors file"):
        load_weights(saved)
    assert not sprung.exists()


def test_a_pickle_under_its_own_suffix_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "model.pt")
    with pytest.raises(WeightsError, match=r"card file .*model.json does not exist; weights are a .safetensors file"):
        load_weights(tmp_path / "model.pt")


# ---------------------------------------------------------------------- saving


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_meta_parameters_that_are_not_finite_are_not_saved(tmp_path: Path, bad: float) -> None:
    rule = make_rule()
    nn.init.constant_(rule.body.output.weight, bad)
    with pytest.raises(WeightsError, match="test holds values that are not finite, in body.output.weight"):
        save_weights(rule, make_card(), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_values_too_large_for_single_precision_are_not_saved(tmp_path: Path) -> None:
    rule = make_rule().double()
    nn.init.constant_(rule.alpha.raw, 1e300)
    with pytest.raises(WeightsError, match="alpha.raw"):
        save_weights(rule, make_card(), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_card_of_another_rule_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="card 'test' describes the rule"):
        save_weights(make_rule("ds"), make_card("slots"), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_card_that_is_no_json_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    for results in ({"loss": float("nan")}, {"loss": torch.ones(1)}):
        with pytest.raises((ValueError, TypeError)):
            save_weights(make_rule(), make_card(results=results), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_saving_leaves_the_rule_and_the_card_as_they_are(tmp_path: Path) -> None:
    rule, card = make_rule(), make_card()
    before = {name: value.clone() for name, value in rule.state_dict().items()}
    saved = save_weights(rule, card, tmp_path)
    assert saved.rule is rule and card.sha256 == "" and saved.card == replace(card, sha256=saved.card.sha256)
    assert all(torch.equal(value, before[name]) for name, value in rule.state_dict().items())
    assert all(parameter.requires_grad for parameter in rule.parameters())
