"""What is timed of an arm and of Adam, with a clock of made-up seconds."""

import pytest
import torch

from gmn_optim.comparison import timing
from gmn_optim.comparison.arms import Setting, arms
from gmn_optim.tasks.quadratic import QuadraticTask

PAIR = (arms["adam"], Setting(0.1)), (arms["soap"], Setting(0.2))


class Loop:
    """A training whose first five steps take the arm seven seconds each, and all others one."""

    made: list["Loop"] = []

    def __init__(self, task, arm, setting, seed, total_steps):
        self.arm, self.seed, self.seconds, self.taken = arm.name, seed, 0.0, 0
        self.made.append(self)

    def step(self):
        """Take one step."""
        self.taken += 1
        self.seconds += 7.0 if self.arm == "soap" and self.taken <= 5 else 1.0


@pytest.fixture(autouse=True)
def _made_up_seconds(monkeypatch):
    """Let trainings take the seconds that they say."""
    monkeypatch.setattr(timing, "TrainingLoop", Loop)
    Loop.made = []


@pytest.mark.parametrize(("steps", "ratio", "seconds"), [(3, 7.0, 7.0), (25, 55 / 25, 55 / 25)])
def test_every_step_to_the_target_counts_and_no_other(steps, ratio, seconds):
    found = timing.time_against_adam(QuadraticTask(), "any", *PAIR, rounds=3, seed=8, steps=steps)
    assert found.ratios == [ratio] * 3 and found.seconds == pytest.approx(seconds)
    assert (found.task, found.arm, found.steps) == ("any", "soap", steps)
    assert found.parameters == sum(parameter.numel() for parameter in QuadraticTask().module.parameters())
    assert [(each.arm, each.seed, each.taken) for each in Loop.made[2:]] == [
        (arm, seed, steps) for seed in (8, 9, 10) for arm in ("adam", "soap")
    ]


def test_the_first_training_is_thrown_away():
    timing.time_against_adam(QuadraticTask(), "any", *PAIR, rounds=1, seed=0, steps=30)
    assert [each.taken for each in Loop.made] == [timing.WARM_UP, timing.WARM_UP, 30, 30]


def test_a_training_that_diverges_has_no_ratios(monkeypatch):
    def fail(self):
        raise torch.linalg.LinAlgError("not a number")

    monkeypatch.setattr(Loop, "step", fail)
    assert timing.time_against_adam(QuadraticTask(), "any", *PAIR, rounds=1, seed=0, steps=30).ratios == []
