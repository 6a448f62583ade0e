import json
import math

import pytest
import torch

from gmn_optim.cli import main
from gmn_optim.comparison import Arm, Protocol, compare, protocol, report
from gmn_optim.comparison.arms import Setting
from gmn_optim.comparison.pictures import can_draw
from gmn_optim.comparison.record import LINES, Record
from gmn_optim.comparison.tuning import is_at_edge, next_setting, tune
from gmn_optim.errors import CheckpointError, InvalidArgumentError
from tests.comparison.problems import TeacherTask

SHORT = Protocol(seeds=2, tuning_seeds=1, steps=12, every=4, rounds=1)
ARM = Arm("adagrad", lambda model, lr, total_steps: torch.optim.Adagrad(model.parameters(), lr=lr), lrs=(0.01, 0.1))


def small_comparison(folder, **changes):
    return compare({"teacher": TeacherTask()}, [ARM], folder=folder, protocol=Protocol(**{**vars(SHORT), **changes}))


@pytest.fixture(name="count")
def fixture_count(monkeypatch):
    """Count the trainings that are really made."""
    made, train = [], protocol.train
    monkeypatch.setattr(protocol, "train", lambda *args, **more: made.append(args) or train(*args, **more))
    return made


def test_an_interior_optimum_needs_no_extension():
    asked = []
    best = tune(
        Arm("a", None, (1.0, 2.0, 4.0)), lambda setting, extended: asked.append(extended) or abs(setting.lr - 2)
    )
    assert best.lr == 2.0 and asked == [False] * 3


@pytest.mark.parametrize(("optimum", "best", "extensions"), [(16.0, 16.0, 3), (0.25, 0.25, 3), (1e9, 64.0, 4)])
def test_a_grid_is_extended_until_the_best_is_inside_or_four_times(optimum, best, extensions):
    asked = []

    def evaluate(setting, extended):
        asked.append((setting, extended))
        return abs(math.log(setting.lr / optimum))

    assert tune(Arm("a", None, (1.0, 2.0, 4.0)), evaluate).lr == best
    assert sum(extended for _, extended in asked) == extensions
    assert is_at_edge(Setting(best), [setting for setting, _ in asked]) == (extensions == 4)


def test_an_option_is_extended_at_the_best_lr():
    tried = [Setting(lr, (("damping", d),)) for lr in (1.0, 2.0, 4.0) for d in (0.01, 0.1)]
    assert next_setting(Setting(2.0, (("damping", 0.1),)), tried) == Setting(2.0, (("damping", 1.0),))


def test_a_grid_that_fails_altogether_is_extended_downwards():
    assert tune(Arm("a", None, (1.0, 10.0)), lambda setting, extended: math.inf).lr == pytest.approx(1e-4)


def test_an_arm_of_one_setting_is_not_tuned():
    assert tune(Arm("a", None, (1.0,)), None).lr == 1.0


def test_a_finished_comparison_trains_nothing_again(tmp_path, count):
    first = small_comparison(tmp_path)
    assert count
    count.clear()
    assert str(small_comparison(tmp_path)) == str(first) and not count


def test_a_stopped_comparison_goes_on_where_it_was(tmp_path, count):
    first = small_comparison(tmp_path)
    path, made = tmp_path / LINES, len(count)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]) + lines[5][:20])
    count.clear()
    second = small_comparison(tmp_path)
    assert len(count) == made - 5
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()].count("training") == made
    arms = [found.tasks["teacher"].arms["adagrad"] for found in (first, second)]
    assert torch.equal(*(arm.curves.held_out for arm in arms)) and arms[0].setting == arms[1].setting


def test_trainings_for_tuning_and_for_the_test_have_other_seeds(tmp_path):
    small_comparison(tmp_path)
    trainings = Record(tmp_path).trainings.values()
    seeds = {split: {each.seed for each in trainings if each.split == split} for split in ("validation", "test")}
    assert len(seeds["validation"]) == 1 and len(seeds["test"]) == 2 and not seeds["validation"] & seeds["test"]


def test_a_change_of_settings_is_refused(tmp_path):
    small_comparison(tmp_path)
    with pytest.raises(CheckpointError, match="seeds was 2, now 3"):
        small_comparison(tmp_path, seeds=3)


def test_numbers_that_make_no_sense_are_refused():
    with pytest.raises(InvalidArgumentError, match="seeds=0"):
        Protocol(seeds=0)
    with pytest.raises(InvalidArgumentError, match="every=20 exceeds the 2 steps"):
        compare({"teacher": TeacherTask(horizon=2)}, [])


def test_a_report_rebuilds_what_the_comparison_wrote(tmp_path):
    found = small_comparison(tmp_path)
    names = ["report.md", "figures.json", *(["teacher.png"] if can_draw() else [])]
    written = {name: (tmp_path / name).read_bytes() for name in names}
    for name in names:
        (tmp_path / name).unlink()
    assert str(report(tmp_path)) == str(found)
    assert {name: (tmp_path / name).read_bytes() for name in names if name != "teacher.png"} == {
        name: data for name, data in written.items() if name != "teacher.png"
    }
    assert all((tmp_path / name).exists() for name in names)


def test_figures_are_json_without_numbers_that_json_lacks(tmp_path):
    small_comparison(tmp_path)
    figures = json.loads((tmp_path / "figures.json").read_text(), parse_constant=pytest.fail)
    assert figures["tasks"]["teacher"]["arms"]["adam"]["factor"] == 1.0


def test_an_arm_without_its_package_is_named_in_the_report():
    absent = Arm("absent", None, lrs=(1.0,), needs=("no_such_package", "no-such-package>=1"))
    found = compare({"teacher": TeacherTask()}, [absent], protocol=SHORT)
    assert "Skipped: absent (pip install 'no-such-package>=1')." in str(found)


def run(arguments, capsys):
    status = main(arguments)
    return status, *capsys.readouterr()


def test_the_command_compares_and_reports(tmp_path, capsys):
    folder = str(tmp_path / "found")
    options = "--arms sgd-momentum --seeds 2 --tuning-seeds 1 --steps 8 --every 4 --rounds 1 --quiet --out".split()
    status, out, _ = run(["compare", "quadratic", *options, folder], capsys)
    assert status == 0 and "sgd-momentum" in out and "fewer steps" in out
    assert run(["compare", "--report", folder], capsys)[:2] == (0, out)
    written = (tmp_path / "found" / "report.md").read_bytes()
    for part in (["quadratic", "--rivals", "sgd-momentum"], ["--medians", "3"]):
        assert run(["compare", *part, "--report", folder], capsys)[0] == 0
    assert (tmp_path / "found" / "report.md").read_bytes() == written
    refused = (["other"], "no task other"), (["--rivals", "lion"], "no arm lion"), (["--medians", "0"], "an odd number")
    for part, message in refused:
        status, _, err = run(["compare", "--report", folder, *part], capsys)
        assert status == 2 and message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no task was given"),
        (["quadratic", "--rivals", "soap", "--out", "{f}"], "give '--report DIR' too"),
        (["quadratic", "--medians", "5", "--out", "{f}"], "give '--report DIR' too"),
        (["quadratics", "--out", "{f}"], "Did you mean 'quadratic'"),
        (["quadratic", "--arms", "muno", "--out", "{f}"], "Did you mean 'muon'"),
        (["quadratic", "--seeds", "0", "--out", "{f}"], "seeds=0 is too low"),
        (["--report", "{f}"], "does not exist; give the folder of a comparison"),
    ],
)
def test_the_command_refuses_in_one_clear_line(arguments, message, tmp_path, capsys):
    status, out, err = run(["compare", *(each.format(f=tmp_path / "x") for each in arguments)], capsys)
    assert status == 2 and out == "" and message in err and err.count("\n") == 1


def test_timings_that_left_out_the_first_steps_are_made_anew(tmp_path):
    small_comparison(tmp_path)
    path = tmp_path / LINES
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    older = [{k: v for k, v in each.items() if k not in ("steps", "parameters")} for each in lines]
    path.write_text("".join(json.dumps(each) + "\n" for each in older))
    assert not Record(tmp_path).timings and len(Record(tmp_path).trainings) == len(
        [each for each in lines if each["kind"] == "training"]
    )
