import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMOKE = {
    "replace_adam.py": ["--smoke", "--out", "{folder}/curves.png"],
    "custom_layer.py": [],
    "benchmarks/step_cost.py": ["--smoke", "--rounds", "1"],
    "benchmarks/long_run.py": ["--smoke"],
    "benchmarks/annealing.py": ["--smoke"],
    "benchmarks/kronecker_basis.py": ["--smoke"],
    "benchmarks/inner_steps.py": ["--unrolls", "2", "--steps", "2", "--rounds", "1"],
    "benchmarks/differential_equations.py": ["--smoke"],
    "benchmarks/safety.py": ["--smoke", "--out", "{folder}/safety"],
}


@pytest.mark.parametrize("script", SMOKE)
def test_an_example_runs_and_prints_a_table(script, tmp_path):
    arguments = [argument.format(folder=tmp_path) for argument in SMOKE[script]]
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLCONFIGDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "---" in done.stdout and "|" in done.stdout


def test_the_picture_of_replace_adam_is_drawn(tmp_path, capsys):
    module = runpy.run_path(str(ROOT / "examples" / "replace_adam.py"))
    module["main"](["--smoke", "--out", str(tmp_path / "curves.png")])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "GMNOptimizer(model)" in capsys.readouterr().out


def test_every_script_has_a_smoke_run():
    scripts = {str(path.relative_to(ROOT / "examples")) for path in (ROOT / "examples").rglob("*.py")}
    assert scripts - {"data/make_fashion_mnist_8x8.py"} == set(SMOKE)
