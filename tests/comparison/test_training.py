import math

import pytest
import torch
from torch import nn

from gmn_optim import GMNOptimizer
from gmn_optim.comparison.arms import Arm, Setting, arms, find_arms
from gmn_optim.comparison.training import TrainingLoop, load_initial_parameters, train
from gmn_optim.errors import InvalidArgumentError, UnknownNameError
from gmn_optim.tasks.quadratic import QuadraticTask
from gmn_optim.weights import load_weights
from tests.comparison.problems import NextTokenTask, TeacherTask

LRS = {"gmn": 1.0, "gmn-drop-in": 1.0, "nominal": 1.0, "sgd-momentum": 0.03, "shampoo": 0.1, "kfac": 0.1}
NAMES = [name for name in arms if not name.startswith("example")]


@pytest.mark.parametrize("task", [TeacherTask(), NextTokenTask()], ids=["convolution", "tokens"])
@pytest.mark.parametrize("name", NAMES)
def test_every_arm_lowers_the_loss(name, task):
    arm = arms[name]
    if arm.missing:
        pytest.skip(f"needs {arm.missing}")
    setting = Setting(LRS.get(name, 0.01), arm.settings()[0].options)
    found = train(task, arm, setting, seed=1, split="test", steps=40, every=20)
    assert not found.stopped
    assert found.held_out[-1] < 0.8 * found.held_out[0]


def test_adam_is_a_hand_written_loop_bit_for_bit():
    task, generator = TeacherTask(), torch.Generator().manual_seed(3)
    load_initial_parameters(task, generator)
    optimizer, held_out = torch.optim.Adam(task.module.parameters(), lr=0.01), []
    for step in range(21):
        if step % 10 == 0:
            inputs, targets = task.held_out("validation")
            with torch.no_grad():
                held_out.append(nn.functional.mse_loss(task.module(inputs), targets).item())
        inputs, targets = task.sample_batch(generator)
        optimizer.zero_grad()
        nn.functional.mse_loss(task.module(inputs), targets).backward()
        optimizer.step()
    found = train(TeacherTask(), arms["adam"], Setting(0.01), seed=3, split="validation", steps=20, every=10)
    assert found.held_out == held_out


def test_all_arms_see_the_same_parameters_and_batches():
    seen = {}
    for name in ("adam", "sgd-momentum", "kronecker_adam"):
        task, batches = TeacherTask(), []
        draw = task.sample_batch
        task.sample_batch = lambda generator, draw=draw, batches=batches: batches.append(draw(generator)) or batches[-1]
        loop = TrainingLoop(task, arms[name], Setting(0.001), seed=4, total_steps=3)
        start = [each.clone() for each in loop.module.parameters()]
        for _ in range(3):
            loop.step()
        seen[name] = [*start, *(part for batch in batches for part in batch)]
    first = seen.pop("adam")
    assert all(torch.equal(a, b) for other in seen.values() for a, b in zip(first, other, strict=True))


def test_a_task_is_left_as_it_was():
    task = TeacherTask()
    before = [each.clone() for each in task.module.parameters()]
    train(task, arms["adam"], Setting(0.01), seed=1, split="test", steps=4, every=2)
    assert all(torch.equal(a, b) for a, b in zip(before, task.module.parameters(), strict=True))
    assert not task.module[0]._forward_hooks


def test_hooks_see_the_passes_of_a_task():
    loop = TrainingLoop(TeacherTask(), arms["gmn"], Setting(1.0), seed=1, total_steps=2)
    loop.step()
    (optimizer,) = loop.optimizers.optimizers
    assert isinstance(optimizer, GMNOptimizer)
    rows = optimizer.summary().rows
    assert any("Kronecker factors of each data point" in row.because for row in rows)
    assert not any("do not" in row.because for row in rows)


@pytest.mark.parametrize(("name", "is_averaged"), [("gmn", True), ("gmn-drop-in", False), ("nominal", True)])
def test_own_arms_are_measured_at_their_averages_but_the_drop_in(name, is_averaged):
    loop = TrainingLoop(TeacherTask(), arms[name], Setting(1.0), seed=1, total_steps=10)
    for _ in range(10):
        loop.step()
    (optimizer,), batch = loop.optimizers.optimizers, loop.task.held_out("test")
    measured = loop.measure(batch)
    plain = loop.task.loss(dict(loop.module.named_parameters()), batch).item()
    optimizer.eval()
    averaged = loop.task.loss(dict(loop.module.named_parameters()), batch).item()
    assert plain != averaged
    assert measured == (averaged if is_averaged else plain)


def test_measuring_neither_trains_nor_counts_as_a_pass():
    def losses(every):
        return train(TeacherTask(), arms["gmn"], Setting(1.0), seed=1, split="test", steps=12, every=every).held_out

    assert losses(4) == losses(2)[::2]


@pytest.mark.skipif(arms["schedule-free"].missing is not None, reason="needs schedulefree")
def test_schedule_free_is_measured_at_its_average():
    loop = TrainingLoop(QuadraticTask(), arms["schedule-free"], Setting(0.1), seed=1, total_steps=10)
    for _ in range(10):
        loop.step()
    (optimizer,), batch = loop.optimizers.optimizers, loop.task.held_out("test")
    measured, trained = loop.measure(batch), loop.module.x.clone()
    optimizer.eval()
    assert loop.task.loss({"x": loop.module.x}, batch).item() == measured
    assert not torch.equal(loop.module.x, trained)


@pytest.mark.filterwarnings("ignore")
def test_a_loss_that_is_not_finite_ends_a_training():
    found = train(QuadraticTask(), arms["sgd-momentum"], Setting(1e30), seed=1, split="test", steps=20, every=5)
    assert found.stopped == "the training loss is not finite"
    assert len(found.held_out) == len(found.training) == 5 and found.held_out[1:] == [math.inf] * 4


def test_a_matrix_that_cannot_be_decomposed_ends_a_training():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            torch.linalg.cholesky(-torch.eye(2))

    arm = Arm("failing", lambda model, lr, total_steps: Failing(model.parameters(), lr=lr), lrs=(1.0,))
    found = train(QuadraticTask(), arm, Setting(1.0), seed=1, split="test", steps=4, every=2)
    assert "LinAlgError" in found.stopped and found.held_out[1:] == [math.inf] * 2


def test_parameters_that_are_not_the_networks_are_refused():
    task = QuadraticTask()
    task.module = nn.Linear(2, 1)
    with pytest.raises(InvalidArgumentError, match="must name every parameter of its module"):
        load_initial_parameters(task, torch.Generator())


def test_an_arm_without_its_package_is_skipped_and_named():
    absent = Arm("absent", None, lrs=(1.0,), needs=("no_such_package", "no-such-package>=1"))
    found, missing = find_arms([absent])
    assert [arm.name for arm in found] == ["adam"] and missing == {"absent": "no-such-package>=1"}


def test_an_unknown_arm_is_refused_with_near_matches():
    with pytest.raises(UnknownNameError, match="Did you mean 'soap'"):
        find_arms(["saop"])


def test_a_grid_must_ascend():
    with pytest.raises(InvalidArgumentError, match="positive and ascending"):
        Arm("wrong", None, lrs=(1.0, 0.1))


def test_the_remark_on_gmn_names_what_its_weights_were_made_on():
    assert f"family {load_weights('default').card.family}" in arms["gmn"].remark
