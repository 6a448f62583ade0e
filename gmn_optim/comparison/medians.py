"""Running medians of test curves: figures that no lucky point decides."""

import statistics
from collections.abc import Sequence
from dataclasses import replace

from gmn_optim.comparison.record import Record
from gmn_optim.errors import InvalidArgumentError


def running_medians(values: Sequence[float], window: int) -> list[float]:
    """Return the median of each value and its neighbours, so many in all; near the ends as many as either side has.

    A curve that only falls stays as it is: unlike a running mean, it is not made later.

    Example:
        >>> running_medians([5.0, 4.0, 1.0, 3.0, 2.0], window=3)
        [5.0, 4.0, 3.0, 2.0, 2.0]
    """
    last = len(values) - 1
    reaches = [min(window // 2, place, last - place) for place in range(last + 1)]
    return [statistics.median(values[place - reach : place + reach + 1]) for place, reach in enumerate(reaches)]


def with_medians(record: Record, window: int) -> Record:
    """Return a record in memory whose test curves are running medians; of tuning and timings it has the same.

    Args:
        record: It stays as it is.
        window: Measurements of a median; 1 for the curves as they are.

    Raises:
        InvalidArgumentError: the window is not an odd number from 1 on.

    Example:
        >>> with_medians(Record(None), 2)
        Traceback (most recent call last):
            ...
        gmn_optim.errors.InvalidArgumentError: medians=2 has no measurement in the middle; give an odd number
    """
    if window < 1 or window % 2 == 0:
        raise InvalidArgumentError(f"medians={window} has no measurement in the middle; give an odd number")
    found = Record(None)
    for training in record.trainings.values():
        curve = training.measurements.held_out
        if training.split == "test":
            curve = running_medians(curve, window)
        found.add(replace(training, measurements=training.measurements._replace(held_out=curve)))
    for timing in record.timings.values():
        found.add(timing)
    return found
