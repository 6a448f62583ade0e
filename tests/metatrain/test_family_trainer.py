import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gmn_optim.errors import CheckpointError, InvalidArgumentError, MetaTrainingError
from gmn_optim.metatrain import FamilyConfig
from gmn_optim.metatrain.slots import draw_perturbations
from gmn_optim.metatrain.standardization import slot_gradient
from gmn_optim.rule import RuleConfig
from tests.metatrain.families import make_trainer


def read_log(folder: Path):
    """Return the lines of a log without what a clock told."""

    def keep(facts: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in facts.items() if "seconds" not in key}

    return [json.loads(line, object_hook=keep) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("standardized", [True, False])
def test_a_step_descends_along_the_mean_of_the_slots_estimates(tmp_path, standardized):
    trainer = make_trainer(tmp_path, standardized=standardized, warm_up=0)
    twin = make_trainer(tmp_path / "twin", standardized=standardized)
    trainer.step()
    parts = []
    twin._renew([0, 1])
    for number in (0, 1):
        slot, noise = twin._make_slot(number), draw_perturbations(twin.config, number, 0, twin.mask)
        losses = slot.advance(twin.shape, twin.meta, noise, twin.progress[number])
        parts.append(slot_gradient(*losses, noise, truncations=1, sigma=0.01, standardized=standardized))
    expected = torch.stack(parts).mean(0).clamp(-1.0, 1.0)
    torch.testing.assert_close(trainer.optimizer.state[trainer.meta]["exp_avg"], 0.1 * expected)


def test_slots_take_turns_and_draw_new_tasks_when_their_horizon_is_over(tmp_path):
    trainer = make_trainer(tmp_path, outer_steps=30)
    trainer.run(progress=False)
    turns = [[slot["slot"] for slot in line["slots"]] for line in read_log(tmp_path)]
    assert turns[:3] == [[0, 1], [2, 0], [1, 2]] and len(turns) == 30
    for number in range(3):
        facts = [slot for line in read_log(tmp_path) for slot in line["slots"] if slot["slot"] == number]
        for before, after in zip(facts, facts[1:], strict=False):
            over = before["age"] == before["horizon"]
            assert after["draw"] == before["draw"] + over
            assert after["age"] == (5 if over else before["age"] + 5)
            assert over or after["task"] == before["task"]
        assert facts[-1]["draw"] >= 2
    drawn = {slot["task"].split("-")[0] for line in read_log(tmp_path) for slot in line["slots"]}
    assert drawn == {"quadratic", "mlp"}


def test_perturbations_sum_up_until_a_new_task_is_drawn(tmp_path):
    trainer = make_trainer(tmp_path, slots=1, slots_per_step=1, shortest_horizon=10, longest_horizon=10)
    noise = [draw_perturbations(trainer.config, 0, step, trainer.mask) for step in range(3)]
    for expected in (noise[0], noise[0] + noise[1], noise[2]):
        trainer.step()
        torch.testing.assert_close(trainer.perturbations[0], expected)


def test_frozen_meta_parameters_never_move_and_others_do(tmp_path):
    trainer = make_trainer(tmp_path, frozen=("alpha.raw", "nominal.*"))
    before = trainer.shape.unflatten(trainer.meta.clone())
    after = trainer.shape.unflatten(trainer.run(progress=False))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.startswith(("alpha", "nominal")) for name in moved)
    assert {"beta.raw", "body.output.weight"} <= moved


def test_a_killed_run_continues_bit_for_bit(tmp_path):
    whole = make_trainer(tmp_path / "whole").run(progress=False)
    first = make_trainer(tmp_path / "parts", checkpoint_every=0.0)
    first.run(until=7, progress=False)
    first.step()  # a step after the checkpoint, lost in the crash but already in the log
    second = make_trainer(tmp_path / "parts", checkpoint_every=0.0)
    assert second.step_number == 7
    assert torch.equal(second.run(progress=False), whole)
    assert read_log(tmp_path / "parts") == read_log(tmp_path / "whole")


def test_a_kill_while_a_checkpoint_is_written_loses_nothing(tmp_path, monkeypatch):
    whole = make_trainer(tmp_path / "whole").run(progress=False)
    first = make_trainer(tmp_path / "parts")
    first.run(until=4, progress=False)
    first.step()
    monkeypatch.setattr(first.processes.__class__, "wait", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        first.save()  # slots of step 5 are written, the checkpoint is still that of step 4
    monkeypatch.undo()
    second = make_trainer(tmp_path / "parts")
    assert second.step_number == 4
    assert torch.equal(second.run(progress=False), whole)
    assert {path.stem.split("-")[2] for path in (tmp_path / "parts").glob("slot-*")} <= {"000010"}


def test_a_run_killed_before_its_first_checkpoint_starts_anew_with_its_log(tmp_path):
    make_trainer(tmp_path).step()
    make_trainer(tmp_path).run(until=2, progress=False)
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2]


def test_meta_parameters_are_kept_at_the_start_and_every_so_often(tmp_path):
    make_trainer(tmp_path).run(progress=False)
    kept = sorted(path.name for path in tmp_path.glob("meta-*"))
    assert kept == [f"meta-{step:06d}.safetensors" for step in (0, 5, 10)]


def test_the_log_tells_the_loss_of_every_slot_and_the_seconds_of_every_step(tmp_path):
    make_trainer(tmp_path).run(until=2, progress=False)
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert line["step_seconds"] > 0 and all(slot["seconds"] > 0 for slot in line["slots"]) and line["seconds"] >= 0
    assert set(line["slots"][0]) == {"slot", "draw", "task", "age", "horizon", "loss", "difference", "seconds"}
    assert line["slots"][0]["task"].startswith(("quadratic-", "mlp-"))


def test_a_slot_that_fails_is_named_and_draws_another_task(tmp_path):
    trainer = make_trainer(tmp_path, failing=(3, 4), outer_steps=20)
    assert trainer.run(progress=False).isfinite().all()
    facts = [slot for line in read_log(tmp_path) for slot in line["slots"]]
    failed = [slot for slot in facts if "failure" in slot]
    assert failed and all("ArithmeticError: no task of" in slot["failure"] for slot in failed)
    assert not any(slot["task"].endswith(("-3", "-4")) for slot in facts if "task" in slot)


def test_a_run_without_any_slot_that_works_stops(tmp_path):
    with pytest.raises(MetaTrainingError, match="every slot of outer step 1 failed.*no task of"):
        make_trainer(tmp_path, failing=(2, 3, 4, 5, 6)).run(progress=False)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    make_trainer(tmp_path).run(until=2, progress=False)
    with pytest.raises(CheckpointError, match=r"other settings \(trainer.sigma: 0.01 in the checkpoint, 0.02 now\)"):
        make_trainer(tmp_path, sigma=0.02)


def test_every_fault_of_the_settings_is_named():
    with pytest.raises(InvalidArgumentError, match=r"estimator = 'backprop'.*unrolls = 3.*slots_per_step = 9"):
        FamilyConfig(estimator="backprop", unrolls=3, slots_per_step=9)


def test_meta_training_lowers_the_meta_loss(tmp_path):
    # the step size starts far too small: meta-training has to raise it
    rule = RuleConfig(nominal="momentum", body=None, alpha=0.002)
    settings = {"outer_steps": 60, "lr": 0.01, "frozen": (), "staggered": False, "longest_horizon": 10}
    make_trainer(tmp_path, rule=rule, **settings).run(progress=False)
    losses = [line["loss"] for line in read_log(tmp_path)]
    assert sum(losses[-10:]) / 10 < sum(losses[:10]) / 10 - 0.3
