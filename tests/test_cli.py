import json
import re
import subprocess
import sys

import pytest

from gmn_optim.cli import main
from gmn_optim.weights import list_weights

TINY = (
    "--task quadratic --arm ds --width 4 --depth 1 --alpha 0.02 --unrolls 4 --truncation 5 --evaluate-every 2 --quiet"
)


def run(arguments, capsys):
    status = main(arguments)
    return status, *capsys.readouterr()


def test_list_names_every_shipped_file(capsys):
    status, out, _ = run(["list"], capsys)
    assert status == 0
    assert all(name in out for name in list_weights())


def test_list_takes_a_pattern(capsys):
    _, out, _ = run(["list", "*-ds"], capsys)
    assert "momentum-ds" in out and "adam-gmn" not in out


def test_show_tells_figures_and_limits(capsys):
    status, out, _ = run(["show", "fashion-mnist-mlp.adam-gmn"], capsys)
    assert status == 0
    assert "this rule" in out and "Limit:" in out and "Adam, lr" in out
    status, out, _ = run(["show", "default"], capsys)
    assert status == 0
    assert "validation-letters-mlp" in out and "Limit:" in out and "geometric mean" in out


def test_show_json_is_the_card(capsys):
    _, out, _ = run(["show", "default", "--json"], capsys)
    assert json.loads(out)["aliases"] == ["default"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "fashion-mnist-mlp.adam-gnm"], "Did you mean 'fashion-mnist-mlp.adam-gmn'"),
        (["list", "zzz*"], "no shipped weights match 'zzz*'"),
        (["meta-train", "--folder", "{f}", "--task", "quadratics"], "Did you mean 'quadratic'"),
        (["meta-train", "--folder", "{f}", "--nominal", "adm"], "Did you mean 'adam'"),
        (["meta-train", "--folder", "{f}", "--sigma", "-1"], "sigma = -1.0 must be positive"),
        (["meta-train", "--folder", "{f}", "--longest-horizon", "-5"], "longest_horizon = -5 must be positive"),
        (["meta-train", "--folder", "{f}", "--threads", "0"], "--threads is 0; expected at least 1"),
        (["meta-train", "--folder", __file__, "--task", "quadratic"], "File exists"),
        (["export", "{f}", "x"], "no readable checkpoint"),
        (["export", "{f}", "../x"], "name is '../x'"),
        (["verify", "defautl"], "Did you mean 'default'"),
        (["verify", "default", "--outer-steps", "-1"], "--outer-steps is -1; expected 0 or more"),
        (
            ["verify", "fashion-mnist-mlp.adam-gmn", "--outer-steps", "1", "--quiet"],
            "only runs over a family have some",
        ),
    ],
)
def test_a_wrong_argument_gives_one_clear_line_and_status_2(arguments, message, tmp_path, capsys):
    status, out, err = run([argument.format(f=tmp_path / "run") for argument in arguments], capsys)
    assert status == 2 and out == ""
    assert message in err and err.count("\n") == 1 and err.startswith("gmn-optim: ")


def test_meta_train_stops_and_goes_on_to_the_same_end(tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = [*TINY.split(), "--outer-steps", "4"]
    assert main(["meta-train", *settings, "--folder", str(whole)]) == 0
    assert main(["meta-train", *settings, "--folder", str(parts), "--until", "2"]) == 0
    assert main(["meta-train", *settings, "--folder", str(parts)]) == 0
    ends = [(folder / "meta-000004.safetensors").read_bytes() for folder in (whole, parts)]
    assert ends[0] == ends[1]
    assert capsys.readouterr().err == ""


def test_export_of_a_step_that_was_not_evaluated_lists_those_that_were(tmp_path, capsys):
    assert main(["meta-train", *TINY.split(), "--outer-steps", "2", "--folder", str(tmp_path)]) == 0
    status, _, err = run(["export", str(tmp_path), "x", "--step", "99", "--quiet"], capsys)
    assert status == 2 and "[0, 2]" in err


def test_export_writes_weights_that_show_reads(tmp_path, capsys):
    assert main(["meta-train", *TINY.split(), "--outer-steps", "2", "--folder", str(tmp_path / "run")]) == 0
    assert main(["export", str(tmp_path / "run"), "mine", "--out", str(tmp_path), "--quiet"]) == 0
    capsys.readouterr()
    status, out, _ = run(["show", str(tmp_path / "mine.safetensors")], capsys)
    assert status == 0 and out.startswith("mine\n")


def test_verify_replays_shipped_weights(capsys):
    status, out, err = run(["verify", "default"], capsys)
    assert status == 0 and err == ""
    assert "training loss" in out and out.splitlines()[-1].endswith("matches its card.")


@pytest.mark.parametrize("command", [[], ["list"], ["show"], ["meta-train"], ["validate"], ["export"], ["verify"]])
def test_help_explains_every_option(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "usage: gmn-optim" in text
    assert not re.search(r"^  --[a-z-]+ [A-Z_]+$\n  --", text, flags=re.MULTILINE)


def test_the_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "gmn_optim", "list"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "adam-gmn" in done.stdout
