import json
import math

import pytest
import torch

from gmn_optim.errors import CheckpointError, InvalidArgumentError
from gmn_optim.metatrain import MetaTrainer, TrainerConfig
from gmn_optim.metatrain.export_run import export_run
from gmn_optim.metatrain.runs import build_unroll, describe_run
from gmn_optim.metatrain.trainer import CHECKPOINT
from gmn_optim.rule import RuleConfig
from gmn_optim.weights import load_weights
from tests.tables import ESTIMATORS

RULE = RuleConfig(width=4, depth=1, alpha=0.02, beta=0.1)
SETTINGS = {
    "outer_steps": 8,
    "unrolls": 4,
    "truncation": 5,
    "longest_horizon": 20,
    "warm_up": 2,
    "evaluate_every": 4,
    "evaluation_seeds": (101, 102),
    "checkpoint_every": 1e9,
}


def make_trainer(folder, estimator="pes", rule=RULE, **changes):
    config = TrainerConfig(**{**SETTINGS, "estimator": estimator, **changes})
    unroll = build_unroll("quadratic", rule, seed=config.seed)
    return MetaTrainer(unroll, config, folder, describe_run("quadratic", rule))


def log_without_times(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_killed_run_continues_bit_for_bit(tmp_path, estimator):
    whole = make_trainer(tmp_path / "whole", estimator).run(progress=False)
    first = make_trainer(tmp_path / "parts", estimator)
    first.run(until=4, progress=False)
    first.step()  # a step after the checkpoint, lost in the crash but already in the log
    second = make_trainer(tmp_path / "parts", estimator)
    assert second.step_number == 4
    assert torch.equal(second.run(progress=False), whole)
    assert log_without_times(tmp_path / "parts") == log_without_times(tmp_path / "whole")


def test_meta_training_lowers_the_loss_of_a_quadratic(tmp_path):
    # the step size starts far too small: meta-training has to raise it
    rule = RuleConfig(body=None, alpha=0.002)
    trainer = make_trainer(tmp_path, rule=rule, outer_steps=120, lr=0.01, unrolls=16, evaluate_every=60)
    trainer.run(progress=False)
    means = [sum(line["evaluation"]) for line in log_without_times(tmp_path) if "evaluation" in line]
    assert means[-1] < 0.7 * means[0]


def test_a_checkpoint_of_other_settings_is_refused_and_kept(tmp_path):
    make_trainer(tmp_path).run(until=4, progress=False)
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(CheckpointError, match="other settings.*trainer"):
        make_trainer(tmp_path, sigma=0.02)
    with pytest.raises(CheckpointError, match="rule"):
        make_trainer(tmp_path, rule=RuleConfig(width=8, depth=1))
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_a_damaged_checkpoint_is_refused(tmp_path):
    make_trainer(tmp_path).run(until=4, progress=False)
    content = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        make_trainer(tmp_path)


def test_every_fault_of_the_settings_is_named_at_once():
    with pytest.raises(InvalidArgumentError, match=r"sigma = 0.*lr = -1.*final_lr = 2"):
        TrainerConfig(sigma=0, lr=-1, final_lr=2)


def test_the_meta_gradient_is_clamped_before_adam(tmp_path):
    trainer = make_trainer(tmp_path, clamp=1e-3, warm_up=0)
    trainer.step()
    assert trainer.optimizer.state[trainer.meta]["exp_avg"].abs().max() <= 1e-4 * (1 + 1e-6)


def test_the_log_has_a_line_for_every_step_and_evaluation(tmp_path):
    make_trainer(tmp_path).run(progress=False)
    lines = log_without_times(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert [line["step"] for line in lines if "evaluation" in line] == [0, 4, 8]
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)


def test_an_exported_run_loads_and_tells_what_it_reached(tmp_path):
    make_trainer(tmp_path / "run").run(progress=False)
    saved = export_run(tmp_path / "run", "tiny", tmp_path, description="A test.", aliases=("t",), every=5)
    loaded = load_weights(tmp_path / "tiny.safetensors")
    assert loaded.card == saved.card
    assert loaded.card.training["chosen_step"] in (0, 4, 8)
    results = loaded.card.results
    assert set(results) >= {"adam", "nominal", "rule", "target"} and len(results["rule"]["best_loss_each"]) == 5
    assert len(loaded.card.replay["losses"]) == 20


def test_a_share_of_a_run_on_one_task_is_refused(tmp_path):
    make_trainer(tmp_path / "run").run(progress=False)
    with pytest.raises(InvalidArgumentError, match="share is 0.5, and .* is a run on one task"):
        export_run(tmp_path / "run", "tiny", tmp_path, share=0.5)
    assert not list(tmp_path.glob("tiny*"))


def test_a_folder_without_a_run_cannot_be_exported(tmp_path):
    with pytest.raises(CheckpointError, match="no readable checkpoint"):
        export_run(tmp_path, "x", tmp_path)
