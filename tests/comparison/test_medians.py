"""Running medians of test curves."""

import math

import pytest

from gmn_optim.comparison.arms import Setting
from gmn_optim.comparison.figures import task_figures
from gmn_optim.comparison.medians import running_medians, with_medians
from gmn_optim.comparison.record import Record, Timing, Training
from gmn_optim.comparison.training import Measurements

FALLING = [9.0, 7.0, 4.0, 2.0, 1.0, 0.5]


def record_of(curves: dict[tuple[str, str], list[float]]) -> Record:
    """Return a record of one training for each arm and split."""
    record = Record(None)
    for (arm, split), curve in curves.items():
        found = Measurements(curve, curve, seconds=0.1)
        record.add(Training("any", arm, Setting(0.1), 0, split, 10, False, found))
    return record


@pytest.mark.parametrize("window", [1, 3, 5, 99])
def test_a_curve_that_falls_stays_as_it_is(window):
    assert running_medians(FALLING, window) == FALLING


@pytest.mark.parametrize("lucky", [0.1, math.inf])
def test_a_single_point_decides_nothing(lucky):
    curve = [*FALLING[:3], lucky, *FALLING[3:]]
    assert lucky not in running_medians(curve, 3) and min(running_medians(curve, 3)) == 0.5


def test_a_window_of_five_outvotes_two_points():
    assert running_medians([3.0, 3.0, 3.0, 0.0, 0.0, 3.0, 3.0, 3.0], 5) == [3.0] * 8


def test_test_curves_alone_are_medians_and_the_record_stays():
    curve = [9.0, 7.0, 1.0, 6.0, 5.0]
    record = record_of({("adam", "test"): curve, ("adam", "validation"): curve})
    record.add(Timing("any", "soap", [2.0], 0.001, steps=9, parameters=7))
    found = with_medians(record, 3)
    test, validation = (found.of("any", "adam", split)[0].measurements.held_out for split in ("test", "validation"))
    assert test == [9.0, 7.0, 6.0, 5.0, 5.0] and validation == curve
    assert found.timings == record.timings and record.of("any", "adam", "test")[0].measurements.held_out == curve


def test_the_target_is_no_longer_adams_lucky_point():
    record = record_of({("adam", "test"): [9.0, 6.0, 1.0, 5.0, 4.0], ("soap", "test"): [9.0, 4.0, 3.0, 2.0, 1.5]})
    plain, filtered = task_figures(record, "any"), task_figures(with_medians(record, 3), "any")
    assert (plain.target, plain.arms["soap"].factor) == (1.0, 0.0)
    assert (filtered.target, filtered.arms["soap"].factor) == (4.0, 3.0)


@pytest.mark.parametrize("window", [-1, 0, 4])
def test_a_window_without_a_middle_is_refused(window):
    with pytest.raises(ValueError, match=f"medians={window} has no measurement in the middle"):
        with_medians(Record(None), window)
