"""A configuration survives its way through JSON, and one that makes no sense is refused by name and value."""

import json
import math

import pytest

from gmn_optim.errors import InvalidArgumentError, UnknownNameError
from gmn_optim.nn import GradMetaNetConfig
from gmn_optim.rule import RuleConfig, UpdateRule

CONFIGS = {
    "momentum": RuleConfig(body=None),
    "adam": RuleConfig(nominal="adam", body=None),
    "momentum+ds": RuleConfig(gated=True, scheduled=True, alpha=0.02),
    "momentum+ds+gmn": RuleConfig(gradmetanet=GradMetaNetConfig(width=8, neuron_numbers=False)),
    "adam+ds+gmn": RuleConfig(nominal="adam", memory="moments", gradmetanet=GradMetaNetConfig(reduction="sum")),
}


@pytest.mark.parametrize("arm", CONFIGS)
def test_an_arm_is_named_after_its_parts(arm: str) -> None:
    assert CONFIGS[arm].arm == arm


@pytest.mark.parametrize("arm", CONFIGS)
def test_a_configuration_survives_json(arm: str) -> None:
    assert RuleConfig.from_dict(json.loads(json.dumps(CONFIGS[arm].to_dict()))) == CONFIGS[arm]


def test_missing_keys_take_their_defaults() -> None:
    # files that do not say are of rules that looked at the factors at every step
    assert RuleConfig.from_dict({}) == RuleConfig(follow_every=1)


def test_the_values_that_are_given_stay_as_they_are() -> None:
    values = CONFIGS["adam+ds+gmn"].to_dict()
    before = json.dumps(values)
    RuleConfig.from_dict(values)
    assert json.dumps(values) == before


WRONG = {
    "data_points": [0, -3],
    "width": [0],
    "depth": [0],
    "alpha": [0.0, -1.0, math.inf, math.nan],
    "beta": [0.0, -0.1, math.inf, math.nan],
    "guard": [0.0, -1.0, math.nan],
    "follow_every": [0, 1_001],
    "largest_element": [-1.0, math.inf, math.nan, 4.0],  # of a nominal term without preconditioners
    "largest_pace": [0.0, 5.1],
    "decay": [-1.0, 1.0],
    "gated": [1],
    "scheduled": ["yes"],
    **dict.fromkeys(("setpoint", "annealing", "concentration", "epochs", "least_size"), [-1.0, 0.5, math.nan]),
    "share": [-1.0, 0.5, math.inf],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_value_that_makes_no_sense_is_refused(name: str, value: float) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{name} = {value!r} must be"):
        RuleConfig(**{name: value})


def test_all_faults_are_listed_at_once() -> None:
    with pytest.raises(InvalidArgumentError, match="width = 0 .*depth = 0 .*beta = -1"):
        RuleConfig(width=0, depth=0, beta=-1.0)


def test_gradmetanet_without_a_body_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="gradmetanet = .* must be None if body is None"):
        RuleConfig(body=None, gradmetanet=GradMetaNetConfig())


@pytest.mark.parametrize(
    ("name", "given", "near"), [("nominal", "adm", "adam"), ("body", "dss", "ds"), ("memory", "slot", "slots")]
)
def test_unknown_names_are_refused_with_near_matches(name: str, given: str, near: str) -> None:
    with pytest.raises(UnknownNameError, match=f"'{given}'.*Did you mean '{near}'"):
        RuleConfig(**{name: given})


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"unknown keys \['colour', 'size'\].*known are"):
        RuleConfig.from_dict({"size": 1, "colour": 2})


def test_a_rule_is_as_wide_as_its_body_whatever_the_network_would_write_by_itself() -> None:
    rules = [UpdateRule(RuleConfig(width=8, gradmetanet=GradMetaNetConfig(out_channels=n))) for n in (3, 8, 14)]
    assert {rule.gradmetanet.product.out_channels for rule in rules} == {8}


def test_unknown_keys_of_the_network_are_refused_as_a_bad_argument() -> None:
    with pytest.raises(InvalidArgumentError, match="colour"):
        RuleConfig.from_dict({"gradmetanet": {"colour": 2}})
