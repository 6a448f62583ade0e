"""``gmn-optim meta-train --family`` and ``gmn-optim validate``, which belong together."""

import json
from functools import partial

import pytest

from gmn_optim.cli import main
from gmn_optim.errors import InvalidArgumentError
from gmn_optim.metatrain.family_evaluation import Protocol
from gmn_optim.metatrain.runs import kept_steps
from gmn_optim.metatrain.validation import Validation
from gmn_optim.tasks import families, tasks
from gmn_optim.tasks.quadratic import QuadraticTask
from tests.metatrain.families import TinyFamily, make_trainer

TRAIN = (
    "meta-train --family tiny --nominal adam --arm ds --width 4 --depth 1 --outer-steps 4 --unrolls 4 --slots 3 "
    "--slots-per-step 2 --truncation 5 --held-out-every 0 --shortest-horizon 10 --longest-horizon 20 "
    "--evaluate-every 2 --quiet"
)
VALIDATE = "--every 10 --seeds 1 2 --quiet"
PROTOCOL = Protocol(seeds=(1, 2), every=10)


@pytest.fixture(autouse=True)
def tiny_family(monkeypatch):
    """Register the tiny family, and a second task for it."""
    monkeypatch.setattr(families, "_entries", {"tiny": TinyFamily})
    monkeypatch.setitem(tasks._entries, SECOND, partial(QuadraticTask, size=3))


SECOND = "second-quadratic"


def read_lines(folder):
    return [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]


def test_the_command_line_trains_goes_on_and_validates(tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*TRAIN.split(), "--folder", str(whole)]) == 0
    assert main([*TRAIN.split(), "--folder", str(parts), "--until", "3"]) == 0
    assert main([*TRAIN.split(), "--folder", str(parts)]) == 0
    ends = [(folder / "meta-000004.safetensors").read_bytes() for folder in (whole, parts)]
    assert ends[0] == ends[1]
    assert capsys.readouterr() == ("", "")
    assert main(["validate", str(whole), *VALIDATE.split()]) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()[2:5]] == ["0", "2", "4"] and err == ""
    assert "Best: outer step" in out and out.splitlines()[-2].startswith("quadratic")
    summaries = [line for line in read_lines(whole) if "against_adam" in line]
    assert [line["step"] for line in summaries] == [0, 2, 4]
    assert set(summaries[0]["tasks"]) == {"quadratic"} and summaries[0]["worst_ratio"] > 0
    assert not any(line["settings"]["averages"] for line in read_lines(whole))
    assert main(["validate", str(whole), *VALIDATE.split(), "--averages"]) == 0
    assert sum(line["settings"]["averages"] for line in read_lines(whole)) == len(read_lines(whole)) // 2
    assert summaries[0]["against_nominal"] > 0 and summaries[0]["untuned"] > 0


def test_validation_goes_on_where_it_was_stopped(tmp_path):
    make_trainer(tmp_path).run(until=5, progress=False)
    whole = Validation(tmp_path, PROTOCOL, (1.0, 3.0)).run()
    lines = (tmp_path / "validation.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "validation.jsonl").write_text("".join(lines[:2]) + lines[2][:9])
    assert Validation(tmp_path, PROTOCOL, (1.0, 3.0)).run() == whole
    assert (tmp_path / "validation.jsonl").read_text() == "".join(lines)


def test_validation_measures_only_what_is_new(tmp_path):
    make_trainer(tmp_path).run(until=5, progress=False)
    Validation(tmp_path, PROTOCOL, (1.0,)).run()
    before = len(read_lines(tmp_path))
    make_trainer(tmp_path).run(progress=False)
    assert set(Validation(tmp_path, PROTOCOL, (1.0,)).run()) == {0, 5, 10}
    assert len(read_lines(tmp_path)) == before + 2
    Validation(tmp_path, PROTOCOL, (1.0,)).run(steps=[5])
    assert len(read_lines(tmp_path)) == before + 2


def test_results_of_another_protocol_stay_apart(tmp_path):
    make_trainer(tmp_path).run(until=5, progress=False)
    Validation(tmp_path, PROTOCOL, (1.0,)).run(steps=[5])
    Validation(tmp_path, Protocol(seeds=(3,), every=10), (1.0,)).run(steps=[5])
    assert [line["settings"]["seeds"] for line in read_lines(tmp_path)] == [[1, 2]] * 4 + [[3]] * 4


def test_a_subset_of_the_tasks_counts_alone_and_is_not_measured_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(TinyFamily, "validation", ("quadratic", SECOND))
    make_trainer(tmp_path).run(until=5, progress=False)
    found = Validation(tmp_path, PROTOCOL, (1.0,), ["quadratic"]).run(steps=[5])
    assert set(found[5].tasks) == {"quadratic"} and found[5].against_adam == found[5].tasks["quadratic"].against_adam
    whole = Validation(tmp_path, PROTOCOL, (1.0,)).run(steps=[5])[5]
    assert whole.tasks["quadratic"] == found[5].tasks["quadratic"] and len(whole.tasks) == 2
    lines = read_lines(tmp_path)
    assert [line["task"] for line in lines if "adam" in line] == ["quadratic", SECOND]
    assert [len(line["tasks"]) for line in lines if "against_adam" in line] == [1, 2]


def test_a_task_that_is_none_of_the_familys_is_named(tmp_path):
    make_trainer(tmp_path).run(until=1, progress=False)
    with pytest.raises(InvalidArgumentError, match="mnist: no validation task of the family; known: quadratic"):
        Validation(tmp_path, PROTOCOL, names=["mnist"])


def test_an_outer_step_that_was_not_kept_is_named_with_those_that_were(tmp_path):
    make_trainer(tmp_path).run(until=5, progress=False)
    assert kept_steps(tmp_path) == [0, 5]
    with pytest.raises(InvalidArgumentError, match=r"outer steps \[3\].*kept: \[0, 5\]"):
        Validation(tmp_path, PROTOCOL).run(steps=[3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("meta-train --folder {f} --family tni", "Did you mean 'tiny'"),
        ("meta-train --folder {f} --family tiny --compile", "--compile takes a minute for each task"),
        ("meta-train --folder {f} --task quadratic --slots 3", "--slots given without --family"),
        ("meta-train --folder {f} --family tiny --frozen nothing", "['nothing'] fit no meta-parameter"),
        ("meta-train --folder {f} --family tiny --slots 2", "slots_per_step = 4 must be 1 to slots = 2"),
        ("meta-train --folder {f} --family tiny --averages --held-out-every 0", "averages = True needs held_out_every"),
        ("validate {f}", "no readable checkpoint"),
    ],
)
def test_a_wrong_argument_gives_one_clear_line(arguments, message, tmp_path, capsys):
    assert main(arguments.format(f=tmp_path / "run").split()) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_run_on_a_task_is_not_validated(tmp_path, capsys):
    settings = "--task quadratic --arm nominal --outer-steps 1 --unrolls 2 --truncation 5 --quiet"
    assert main(["meta-train", *settings.split(), "--folder", str(tmp_path / "task")]) == 0
    assert main(["validate", str(tmp_path / "task"), "--quiet"]) == 2
    assert "is no run over a family" in capsys.readouterr().err


def test_task_and_family_exclude_one_another(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(f"meta-train --folder {tmp_path} --task quadratic --family tiny".split())
    assert "not allowed with argument" in capsys.readouterr().err
