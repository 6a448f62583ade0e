"""From a run over a family to weights whose card lets anybody check the run."""

import json
import shlex
from dataclasses import asdict, replace

import pytest

from gmn_optim.cli import _parser, main
from gmn_optim.cli_meta_train import _chosen
from gmn_optim.cli_rule import read_rule_options
from gmn_optim.errors import CheckpointError, InvalidArgumentError, WeightsError
from gmn_optim.metatrain import FamilyConfig, family_export
from gmn_optim.metatrain.choice import as_used, choose_summary, read_summaries
from gmn_optim.metatrain.export_run import export_run
from gmn_optim.metatrain.family_config import LATER_SETTINGS
from gmn_optim.metatrain.family_evaluation import Protocol
from gmn_optim.metatrain.log import append_line
from gmn_optim.metatrain.reproduction import command_line
from gmn_optim.metatrain.validation import Validation
from gmn_optim.metatrain.verification import (
    JUDGED_STEPS,
    Recomputed,
    trainer_config,
    verify_outer_steps,
    verify_replay,
)
from gmn_optim.nn import GradMetaNetConfig
from gmn_optim.rule import RuleConfig
from gmn_optim.tasks import families
from gmn_optim.weights import load_weights, save_weights
from gmn_optim.weights_card import WeightsCard
from tests.metatrain.families import RULE, TinyFamily, make_trainer

PROTOCOL = Protocol(seeds=(1, 2), every=10)


@pytest.fixture(autouse=True)
def tiny_family(monkeypatch):
    """Register the tiny family, and replay on a tiny task."""
    monkeypatch.setattr(families, "_entries", {"tiny": TinyFamily})
    monkeypatch.setattr(family_export, "REPLAY_TASK", "quadratic")


@pytest.fixture
def run_folder(tmp_path):
    """Return the folder of a whole run that was validated."""
    make_trainer(tmp_path / "run").run(progress=False)
    Validation(tmp_path / "run", PROTOCOL).run()
    return tmp_path / "run"


@pytest.fixture
def weights(run_folder, tmp_path):
    """Return its weights, read back."""
    export_run(run_folder, "tiny", tmp_path, description="A test.", commit="abc", aliases=("t",))
    return load_weights(tmp_path / "tiny.safetensors")


def summary(step, speed, worst_ratio, tasks=("a",), seeds=(1,)):
    settings = {"seeds": list(seeds)}
    figures = {"against_nominal": 1.0, "against_adam": 1.0, "speed": speed, "worst_ratio": worst_ratio}
    return {"step": step, **figures, "tasks": {name: {} for name in tasks}, "settings": settings}


def test_the_largest_mean_among_the_harmless_is_chosen():
    found = choose_summary([summary(0, 1.0, 1.0), summary(5, 1.2, 1.05), summary(9, 1.5, 1.06)])
    assert found.summary["step"] == 5 and "among the 2 of 3 outer steps with a worst" in found.reason


@pytest.mark.parametrize("ratio", [1.2, None])
def test_without_a_harmless_one_the_largest_mean_is_chosen_and_the_reason_says_so(ratio):
    found = choose_summary([summary(0, 1.0, 1.1), summary(9, 1.5, ratio)])
    assert found.summary["step"] == 9 and "2 outer steps, there being none with a worst" in found.reason


def test_a_step_given_by_hand_is_taken_or_refused_with_those_that_were_validated():
    assert "given by hand" in choose_summary([summary(0, 1.0, 1.0), summary(5, 2.0, 1.0)], 0).reason
    with pytest.raises(InvalidArgumentError, match=r"outer step 7 was not validated; those that were are \[0\]"):
        choose_summary([summary(0, 1.0, 1.0)], 7)


def test_summaries_of_the_most_tasks_count_then_the_most_steps_then_the_last(tmp_path):
    path = tmp_path / "validation.jsonl"
    with pytest.raises(CheckpointError, match="run 'gmn-optim validate'"):
        read_summaries(path)
    lines = [summary(0, 1, 1), summary(5, 1, 1), summary(0, 2, 1, "ab"), summary(5, 3, 1, "ab", (2,))]
    for line in lines:
        append_line(path, line)
    assert [each["speed"] for each in read_summaries(path)] == [3]
    assert [each["speed"] for each in read_summaries(path, step=0)] == [2]
    append_line(path, summary(5, 4, 1, "ab"))
    assert [each["speed"] for each in read_summaries(path)] == [2, 4]


def test_the_card_of_a_family_run_tells_choice_figures_and_how_to_check_it(weights, run_folder):
    card = weights.card
    assert (card.family, card.task, card.horizon, card.aliases, card.commit) == ("tiny", "", 30, ("t",), "abc")
    assert card.training["chosen_step"] in (0, 5, 10) and card.training["steps_done"] == 10
    assert card.training["slots"] == 3 and card.training["frozen"] == ["alpha.raw"]
    line = [each for each in read_summaries(run_folder / "validation.jsonl")][card.training["chosen_step"] // 5]
    assert card.results["tasks"] == line["tasks"] and card.results["settings"]["seeds"] == [1, 2]
    assert card.results["against_adam"] > 0 and "outer step" in card.results["choice"]
    logged = [json.loads(text) for text in (run_folder / "log.jsonl").read_text().splitlines()]
    assert card.reproduction["losses"] == [each["loss"] for each in logged]
    assert len(card.reproduction["gradient_norms"]) == 10 and set(card.reproduction["meta_norms"]) == {"0", "5", "10"}
    assert card.seconds > 0 or card.training["chosen_step"] == 0


def test_only_the_first_outer_steps_are_recorded(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("gmn_optim.metatrain.reproduction.RECORDED_STEPS", 7)
    card = export_run(run_folder, "tiny", tmp_path).card
    assert len(card.reproduction["losses"]) == 7 and set(card.reproduction["meta_norms"]) == {"0", "5"}


def test_a_run_that_was_not_validated_is_not_exported(tmp_path):
    make_trainer(tmp_path).run(until=1, progress=False)
    with pytest.raises(CheckpointError, match="run 'gmn-optim validate' on its folder first"):
        export_run(tmp_path, "tiny", tmp_path)


@pytest.mark.parametrize(
    "rule",
    [
        RuleConfig(nominal="adam", body=None, alpha=0.004),
        RuleConfig(nominal="adam", gated=True, scheduled=True, decay=1.0, memory="moments", beta=0.1),
        RuleConfig(nominal="kronecker_adam", body="eigenbasis", gradmetanet=GradMetaNetConfig(width=8, set_layers=3)),
        RuleConfig(
            nominal="kronecker_adam",
            body="controller",
            setpoint=0.012,
            largest_pace=0.5,
            annealing=9.0,
            concentration=0.7,
            follow_every=3,
        ),
        RuleConfig(gradmetanet=GradMetaNetConfig(width=4, neuron_layers=2, neuron_numbers=False), width=5, depth=2),
    ],
)
@pytest.mark.parametrize("trainer", [{}, {"frozen": ()}, {"standardized": False, "frozen": ("a*", "b"), "lr": 3e-4}])
def test_the_command_line_gives_back_the_settings(rule, trainer):
    config = FamilyConfig(**trainer)
    settings = json.loads(json.dumps({"family": "tiny", "rule": rule.to_dict(), "trainer": asdict(config)}))
    words = shlex.split(command_line(settings, "runs/a b"))
    options = _parser().parse_args(words[1:])
    assert FamilyConfig(**_chosen(options, FamilyConfig)) == config
    assert read_rule_options(options) == rule
    assert (options.family, str(options.folder)) == ("tiny", "runs/a b")


def test_older_runs_do_not_tell_later_settings():
    trainer = asdict(FamilyConfig())
    settings = {"family": "tiny", "rule": RuleConfig().to_dict(), "trainer": trainer}
    older = {**settings, "trainer": {name: value for name, value in trainer.items() if name not in LATER_SETTINGS}}
    assert command_line(older, "runs/a") == command_line(settings, "runs/a")
    card = WeightsCard(name="a", description="b", rule={}, training=older["trainer"])
    assert trainer_config(card).averages is False


@pytest.mark.parametrize(
    ("rule", "trainer"),
    [
        ({}, {"betas": (0.5, 0.9)}),
        ({}, {"staggered": False}),
        ({"guard": 2.0}, {}),
        ({"nominal": "kronecker_adam", "body": "eigenbasis", "share": 0.5}, {}),
        ({"nominal": "kronecker_adam", "body": "eigenbasis", "least_size": 0.5}, {}),
        ({"gradmetanet": GradMetaNetConfig(reduction="sum")}, {}),
    ],
)
def test_settings_without_an_option_have_no_command_line(rule, trainer):
    settings = {"family": "tiny", "rule": RuleConfig(**rule).to_dict(), "trainer": asdict(FamilyConfig(**trainer))}
    assert command_line(settings, "runs/a") == ""


def test_exported_weights_replay_and_their_first_outer_steps_come_out_again(weights):
    rows = verify_replay(weights) + verify_outer_steps(weights.card, 6)
    assert len(rows) == 20 + 6 + 6 + 2 and all(row.matches for row in rows)
    assert max(row.deviation for row in rows) < 1e-5


def test_what_was_chosen_after_meta_training_does_not_reach_the_verification(weights):
    card = replace(weights.card, rule={**weights.card.rule, "largest_pace": 0.1, "follow_every": 7, "setpoint": 0.0})
    assert all(row.matches for row in verify_outer_steps(card, 2))


def test_a_card_without_the_rule_as_trained_is_refused(weights):
    known = {key: value for key, value in weights.card.reproduction.items() if key != "rule"}
    with pytest.raises(WeightsError, match="lacks the rule as it was meta-trained; export the run anew"):
        verify_outer_steps(replace(weights.card, reproduction=known), 1)


def test_norms_that_a_paused_run_kept_besides_are_left_out(tmp_path):
    make_trainer(tmp_path / "paused").run(until=2, progress=False)
    make_trainer(tmp_path / "paused").run(until=5, progress=False)
    Validation(tmp_path / "paused", PROTOCOL).run()
    card = export_run(tmp_path / "paused", "paused", tmp_path).card
    assert set(card.reproduction["meta_norms"]) == {"0", "2", "5"}
    assert [row.step for row in verify_outer_steps(card, 4) if row.what == "meta-parameter norm"] == [0]


def test_another_loss_on_the_card_is_found(weights):
    losses = [value + 0.01 for value in weights.card.reproduction["losses"]]
    card = replace(weights.card, reproduction={**weights.card.reproduction, "losses": losses})
    wrong = [row for row in verify_outer_steps(card, 2) if not row.matches]
    assert [(row.what, row.step) for row in wrong] == [("meta-loss", 1), ("meta-loss", 2)]


def test_more_outer_steps_than_recorded_are_refused(weights):
    with pytest.raises(InvalidArgumentError, match="11 outer steps asked for, the card of tiny records 10"):
        verify_outer_steps(weights.card, 11)
    with pytest.raises(InvalidArgumentError, match="only runs over a family have some"):
        verify_outer_steps(load_weights("fashion-mnist-mlp.adam-gmn").card, 1)


def test_a_card_without_its_settings_or_replay_is_refused(weights):
    with pytest.raises(WeightsError, match="lacks the settings outer_steps"):
        verify_outer_steps(replace(weights.card, training={}), 1)
    with pytest.raises(WeightsError, match="records no inner training"):
        verify_replay(weights._replace(card=replace(weights.card, replay={})))


@pytest.mark.parametrize(
    ("recorded", "found", "judged", "matches"),
    [
        (1.0, 1.0009, True, True),
        (1.0, 1.1, True, False),
        (1.0, 1.1, False, True),
        (None, None, True, True),
        (None, 1.0, True, False),
        (1e-5, 5e-5, True, False),
    ],
)
def test_numbers_match_within_the_tolerance_where_they_are_judged(recorded, found, judged, matches):
    assert Recomputed("meta-gradient norm", JUDGED_STEPS, recorded, found, judged).matches is matches


def test_a_meta_loss_is_a_logarithm_whose_absolute_deviation_counts():
    assert Recomputed("meta-loss", 1, 1e-5, 5e-5, True).matches


def test_the_command_line_exports_lists_shows_and_verifies(run_folder, tmp_path, capsys, monkeypatch):
    assert main(["export", str(run_folder), "tiny", "--out", str(tmp_path), "--step", "5", "--quiet"]) == 0
    assert "given by hand" in capsys.readouterr().out
    monkeypatch.setattr("gmn_optim.weights._pretrained_folder", lambda: tmp_path)
    assert main(["list"]) == 0 and "family tiny" in capsys.readouterr().out
    assert main(["show", "tiny"]) == 0
    out = capsys.readouterr().out
    assert "quadratic" in out and "geometric mean" in out and "Made by: gmn-optim meta-train --family tiny" in out
    assert main(["verify", "tiny", "--outer-steps", "3", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "meta-gradient norm" in out and "matches its card" in out


def test_verify_says_by_its_exit_status_what_does_not_match(weights, tmp_path, capsys):
    replayed = {**weights.card.replay, "losses": [9.0, *weights.card.replay["losses"][1:]]}
    save_weights(weights.rule, replace(weights.card, name="bad", replay=replayed), tmp_path)
    assert main(["verify", str(tmp_path / "bad.safetensors"), "--quiet"]) == 1
    out = capsys.readouterr().out
    assert "MISMATCH" in out and "does NOT match its card" in out


def test_exporting_the_same_rule_twice_gives_the_same_files(run_folder, tmp_path):
    for out in ("a", "b"):
        export_run(run_folder, "tiny", tmp_path / out)
    for name in ("tiny.safetensors", "tiny.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert as_used(RULE, 1.0) == load_weights(tmp_path / "a" / "tiny.safetensors").rule.config


@pytest.mark.parametrize(
    ("body", "given", "used"), [("controller", 0.7, 0.7), ("controller", 0.0, 0.3), (None, 0.0, 0.0)]
)
def test_a_controller_is_used_with_a_concentration(body, given, used):
    rule = RuleConfig(nominal="kronecker_schedule_free", body=body, concentration=given)
    assert as_used(rule, 1.0).concentration == used


@pytest.mark.parametrize(("body", "given", "used"), [("controller", 2.5, 2.5), ("controller", 0.0, 4.0), (None, 0, 0)])
def test_a_controller_is_used_with_epochs(body, given, used):
    rule = RuleConfig(nominal="kronecker_schedule_free", body=body, epochs=given)
    assert as_used(rule, 1.0).epochs == used
