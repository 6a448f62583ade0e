import json
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from gmn_optim import GMNOptimizer, list_weights, load_weights
from gmn_optim.cli import _parser
from gmn_optim.cli_meta_train import _chosen
from gmn_optim.cli_rule import read_rule_options
from gmn_optim.metatrain import FamilyConfig, TrainerConfig
from gmn_optim.metatrain.choice import as_used
from gmn_optim.metatrain.family_config import LATER_SETTINGS
from gmn_optim.metatrain.verification import verify_replay
from gmn_optim.rule import RuleConfig
from tests.tables import WEIGHTS

README = (Path(__file__).resolve().parents[1] / "pretrained" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_shipped_file_loads_as_the_promised_rule(name):
    rule, card = load_weights(name)
    assert card.name == name and rule.config.arm == WEIGHTS[name]


COMMANDS = [line for line in README.splitlines() if line.startswith("gmn-optim meta-train")]


@pytest.mark.parametrize("line", [line for line in COMMANDS if "--family" in line])
def test_the_command_of_a_family_gives_the_settings_of_the_default(line):
    options, card = _parser().parse_args(shlex.split(line)[1:]), load_weights("default").card
    assert as_used(read_rule_options(options), 1.0) == RuleConfig.from_dict(card.rule)
    settings = json.loads(json.dumps(asdict(FamilyConfig(**_chosen(options, FamilyConfig)))))
    training = {**LATER_SETTINGS, **card.training}
    assert settings == {name: value for name, value in training.items() if name in settings}


@pytest.mark.parametrize("line", [line for line in COMMANDS if "--task" in line])
def test_the_commands_of_the_readme_give_the_settings_of_the_cards(line):
    options = _parser().parse_args(shlex.split(line)[1:])
    card = load_weights(f"fashion-mnist-mlp.{options.folder.name}").card
    assert read_rule_options(options) == RuleConfig.from_dict(card.rule)
    settings = json.loads(json.dumps(asdict(TrainerConfig(**_chosen(options, TrainerConfig)))))
    assert settings == {name: value for name, value in card.training.items() if name in settings}


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_readme_names_all_that_ships(name):
    assert f"`{name}`" in README


def test_exactly_one_file_is_the_default():
    assert sum("default" in load_weights(name).card.aliases for name in list_weights()) == 1


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_shipped_file_replays_its_recorded_curve(name):
    rows = verify_replay(load_weights(name))
    assert len(rows) == 20 and all(row.matches for row in rows)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_card_states_its_figures(name):
    card = load_weights(name).card
    assert card.limits and card.commit and card.description
    assert card.seconds > 0 or card.training["chosen_step"] == 0
    if card.family:
        assert card.results["tasks"] and card.results["against_adam"] and card.results["choice"]
        return
    assert len(card.results["seeds"]) == 5
    assert len(card.results["adam"]["grid"]) == 20
    for arm in ("adam", "nominal", "rule"):
        assert len(card.results[arm]["best_loss_each"]) == 5
        assert set(card.results[arm]) >= {"best_loss", "steps_to_target", "factor"}
    assert len(card.results["nominal"]["grid"]) >= 10


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_learned_term_of_a_shipped_file_does_something(name):
    rule = load_weights(name).rule
    written_by = rule.body.linear if rule.config.body == "controller" else rule.body.output
    assert written_by.weight.abs().max() > 1e-3
    if rule.config.gradmetanet is not None:
        assert rule.gradmetanet.product.to_weight.weight.abs().max() > 1e-3


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_shipped_file_trains_a_model_that_it_never_saw(name):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1))
    x = torch.randn(256, 5)
    y = x[:, :1] * x[:, 1:2]
    optimizer = GMNOptimizer(model, weights=name)
    losses = []
    for step in range(200):
        batch = torch.arange(step * 64, step * 64 + 64) % 256
        loss = torch.nn.functional.mse_loss(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
