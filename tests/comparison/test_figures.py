"""Figures of made-up curves against those computed by hand."""

import math

import pytest

from gmn_optim.comparison.arms import Setting
from gmn_optim.comparison.figures import overall_figures, task_figures
from gmn_optim.comparison.record import Record, Timing, Training
from gmn_optim.comparison.tables import notes, overall_table, task_table, to_json
from gmn_optim.comparison.training import Measurements

NEVER = math.inf


def add(record, task, arm, lr, split, *curves, stopped=""):
    """Put one training on record for each curve, measured every 10 steps."""
    for seed, curve in enumerate(curves):
        found = Measurements(list(curve), [math.nan] * len(curve), 1.0, stopped)
        record.add(Training(task, arm, Setting(lr), seed, split, 10, False, found))


@pytest.fixture(name="record")
def fixture_record():
    """Two tasks; on the first, Adam's mean curve is 4, 3, 2, 1.5, 1.75 and its target 1.5 at step 30."""
    record = Record(None)
    for lr, low in ((0.01, 2.0), (0.1, 1.0), (1.0, 3.0)):
        add(record, "one", "adam", lr, "validation", [4, low, low + 1, 4, 4])
    add(record, "one", "adam", 0.1, "test", [4, 3, 2, 1.0, 1.5], [4, 3, 2, 2.0, 2.0])
    add(record, "one", "soap", 0.1, "test", [4, 1.0, 1, 1, 1], [4, 2, 1, 1, 1])
    add(record, "one", "muon", 0.1, "test", [4, 3, 1.5, 1.5, 1.5], [4, 3, 1.5, 1, 1])
    add(record, "one", "slow", 0.1, "test", [4, 4, 4, 4, 3.5], [4, 4, 4, 4, 3.5])
    record.add(Timing("one", "soap", [4.0, 2.0, 3.0], 0.1, 30, 200_000))
    add(record, "two", "adam", 0.1, "test", [2, 1, 0.5, 0.5, 0.5])
    add(record, "two", "soap", 0.1, "test", [2, 0.5, 0.5, 0.5, 0.5])
    add(record, "two", "slow", 0.1, "test", [2, NEVER, NEVER, NEVER, NEVER], stopped="the training loss is not finite")
    return record


def test_the_target_is_the_lowest_point_of_adams_mean_curve(record):
    found = task_figures(record, "one")
    assert (found.target, found.adam_steps, found.steps) == (1.5, 30, 40)
    assert list(found.arms) == ["adam", "soap", "muon", "slow"]


def test_adam_is_taken_at_the_lr_that_is_best_on_the_validation_set(record):
    add(record, "one", "adam", 1.0, "test", [4, 0, 0, 0, 0])
    adam = task_figures(record, "one").arms["adam"]
    assert adam.setting == Setting(0.1) and adam.grid == (0.01, 0.1, 1.0) and not adam.at_edge


def test_figures_of_an_arm(record):
    soap = task_figures(record, "one").arms["soap"]
    assert (soap.steps_to_target, soap.steps_to_target_each) == (10, (10, 20))
    assert (soap.best_loss, soap.final_loss, soap.final_std) == (1.0, 1.0, 0.0)
    assert (soap.factor, soap.step_time, soap.time_factor) == (3.0, 3.0, 1.0)


def test_the_spread_of_the_final_loss_is_over_seeds(record):
    adam = task_figures(record, "one").arms["adam"]
    assert adam.final_loss == 1.75 and adam.final_std == pytest.approx(0.5 / math.sqrt(2))
    assert adam.steps_to_target_each == (30, math.inf)


def test_what_never_reaches_the_target_has_no_factor(record):
    slow = task_figures(record, "one").arms["slow"]
    assert slow.steps_to_target == math.inf and slow.factor == slow.time_factor == 0.0
    assert "not reached" in task_table(task_figures(record, "one"))


def test_overall_figures_are_geometric_means_over_tasks(record):
    found = overall_figures([task_figures(record, name) for name in ("one", "two")])
    assert found["soap"].factor == pytest.approx(math.sqrt(3.0 * 2.0))
    assert found["soap"].worst_final == 1.0 and (found["soap"].tasks, found["soap"].reached) == (2, 2)
    assert math.isnan(found["soap"].time_factor)
    # against muon on the first task alone: muon's factor is 30 / 20
    assert found["soap"].against_strong == pytest.approx(3.0 / 1.5)
    # Adam against the best of soap and muon: 1/3 and 1/2
    assert found["adam"].against_strong == pytest.approx(math.sqrt(1 / 3 * 1 / 2))


def test_a_missed_target_counts_as_the_whole_training_and_is_marked(record):
    tasks = [task_figures(record, name) for name in ("one", "two")]
    found = overall_figures(tasks)
    assert found["slow"].factor == pytest.approx(math.sqrt(30 / 40 * 20 / 40))
    assert found["slow"].worst_final == math.inf and found["slow"].reached == 0
    assert "<0.61x" in overall_table(found) and "failed" in overall_table(found)


def test_failed_trainings_and_edges_are_noted(record):
    assert notes(task_figures(record, "two")) == ["slow: 1 of 1 trainings failed."]
    add(record, "one", "adam", 0.001, "validation", [4, 0.5, 1, 1, 1])
    add(record, "one", "adam", 0.001, "test", [4, 0.5, 1, 1, 1])
    assert notes(task_figures(record, "one"))[0].startswith("adam: the best setting (lr 0.001) is at the edge")


def test_json_has_none_for_what_is_not_finite(record):
    slow = to_json(task_figures(record, "two"))["arms"]["slow"]
    assert slow["steps_to_target"] is None and slow["curves"]["held_out"][1] == [None]


def test_a_task_without_adam_has_no_figures(record):
    assert task_figures(record, "three") is None


def test_adam_that_never_improves_has_a_target_at_one_step():
    record = Record(None)
    add(record, "bad", "adam", 0.1, "test", [1.0, 2.0, 3.0])
    add(record, "bad", "soap", 0.1, "test", [1.0, 2.0, 0.5])
    found = task_figures(record, "bad")
    assert found.adam_steps == 1 and found.arms["soap"].factor == 1.0
    assert overall_figures([found])["soap"].factor == 1.0


def test_time_on_tasks_of_many_parameters_stands_apart(record):
    record.add(Timing("two", "soap", [0.5], 0.1, 10, 99))
    found = overall_figures([task_figures(record, name) for name in ("one", "two")])["soap"]
    assert found.time_factor == pytest.approx(math.sqrt(1.0 * 4.0)) and found.many_time_factor == 1.0
    assert math.isnan(overall_figures([task_figures(record, "two")])["soap"].many_time_factor)


def test_other_rivals_may_be_named(record):
    found = overall_figures([task_figures(record, "one")], rivals=["slow", "muon"])
    assert found["soap"].against_strong == pytest.approx(3.0 / 1.5)
    assert overall_figures([task_figures(record, "one")], rivals=["soap"])["muon"].against_strong == pytest.approx(0.5)


def test_a_bound_is_marked_where_a_target_was_missed_and_nowhere_else():
    record = Record(None)
    for task, parameters, losses in (("large", 1_000_000, [2.0, 1.0]), ("small", 10, [2.0, 1.5])):
        add(record, task, "adam", 0.1, "test", [2.0, 1.0])
        add(record, task, "soap", 0.1, "test", losses)
        record.add(Timing(task, "soap", [2.0], 0.1, 10, parameters))
    figures = overall_figures([task_figures(record, task) for task in ("large", "small")])
    cells = [cell.strip() for cell in overall_table(figures).splitlines()[3].split(" | ")]
    assert cells == ["soap", "2", "1", "<1.00x", "<0.50x", "0.50x", "-", "1.50x"]
