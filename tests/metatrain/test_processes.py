"""Several processes share a run: the result is that of one, bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gmn_optim.errors import InvalidArgumentError
from gmn_optim.metatrain.processes import Processes, join_processes, require_one_process
from gmn_optim.metatrain.slot_report import SlotReport, report_of
from tests.metatrain.families import make_trainer
from tests.metatrain.test_family_trainer import read_log

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]

needs_gloo = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")


def run_processes(count: int, folder: Path, until: int, *failing: int) -> subprocess.CompletedProcess[str]:
    """Meta-train on the tiny family with torchrun."""
    arguments = [str(count), "-m", "tests.metatrain.families", str(folder), str(until), *map(str, failing)]
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [*PROGRAM, *arguments], env=os.environ | variables, cwd=ROOT, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(name="one_thread")
def fixture_one_thread():
    """Compute as torchrun's processes do, with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@needs_gloo
def test_two_processes_do_what_one_does_and_each_goes_on_from_the_other(tmp_path, one_thread):
    failing = (4,)
    make_trainer(tmp_path / "one", failing=failing).run(progress=False)
    make_trainer(tmp_path / "two", failing=failing).run(until=3, progress=False)
    assert (done := run_processes(2, tmp_path / "two", 7, *failing)).returncode == 0, done.stderr
    make_trainer(tmp_path / "two", failing=failing).run(progress=False)
    log = read_log(tmp_path / "two")
    assert log == read_log(tmp_path / "one")
    assert any("failure" in slot for line in log for slot in line["slots"])
    for name in [f"meta-{step:06d}.safetensors" for step in (0, 5, 10)]:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


LEAVING = """
import os, torch
from gmn_optim.metatrain.processes import join_processes
with join_processes() as processes:
    weight = torch.ones(2, requires_grad=True)
    weight.grad = torch.ones(2)
    torch.optim.Adam([weight]).step()  # torch imports what knows the group
    processes.wait()
print(*(open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")))
"""


@needs_gloo
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are listed on Linux alone")
def test_no_thread_of_the_group_outlives_it():
    program = [*PROGRAM, "2", "--no-python", sys.executable, "-c", LEAVING]
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(program, env=os.environ | variables, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "python" in done.stdout and "gloo" not in done.stdout, done.stdout


@needs_gloo
def test_processes_that_cannot_go_on_stop_together(tmp_path):
    done = run_processes(2, tmp_path, 4, 2, 3, 4, 5, 6)
    assert done.returncode != 0 and "every slot of outer step 1 failed" in done.stderr


def test_slots_are_dealt_round_robin():
    first, second = Processes(0, 2), Processes(1, 2)
    assert [first.owns(slot) for slot in range(4)] == [True, False, True, False]
    assert [second.owns(slot) for slot in range(4)] == [False, True, False, True]
    assert first.is_first and not second.is_first


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    require_one_process()
    with join_processes() as processes:
        assert processes == Processes(0, 1) and processes.agree(True) and not processes.agree(False)


def test_a_run_on_one_task_refuses_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidArgumentError, match="2 processes for one task; only a run with --family"):
        require_one_process()


@pytest.mark.parametrize("text", ["mlp", "ä" * 300, ""])
def test_a_report_is_a_row_of_fixed_length_that_keeps_losses_exactly(text):
    losses = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    row = SlotReport(*losses, text, failed=True, seconds=1.5).encode()
    found = SlotReport.decode(row, torch.float32)
    assert row.shape == (SlotReport.width(3),) and found.failed and found.seconds == 1.5 and found.text == text[:128]
    assert torch.equal(found.positive, losses[0]) and torch.equal(found.negative, losses[1])


def test_an_error_becomes_a_report_and_an_interruption_does_not():
    def stop():
        raise KeyboardInterrupt

    found = report_of(lambda: 1 / 0, pairs=2)
    assert found.failed and found.text == "ZeroDivisionError: division by zero" and len(found.positive) == 2
    with pytest.raises(KeyboardInterrupt):
        report_of(stop, pairs=2)
