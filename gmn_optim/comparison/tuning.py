"""The search for an arm's best setting, which goes on beyond the edge of a grid where the best lies there."""

from collections.abc import Callable, Mapping, Sequence

from gmn_optim.comparison.arms import Arm, Setting, round_lr

MOST_EXTENSIONS = 4
"""Settings that are added to a grid at most."""

Score = tuple[float, float]
"""Steps to the target, and the lowest loss; infinite where there is none."""

Evaluate = Callable[[Setting, bool], Score]
"""``(setting, extended)`` to what is compared."""


def tune(arm: Arm, evaluate: Evaluate) -> Setting:
    """Return the setting with the lowest score, extending the grid while the best is at its edge.

    An arm with a single setting is not tuned at all.

    Args:
        arm: Whose grid.
        evaluate: Gives the score of a setting.

    Example:
        >>> arm = Arm("any", make=None, lrs=(0.01, 0.1, 1.0))
        >>> tune(arm, lambda setting, extended: (0.0, abs(setting.lr - 10))).lr
        10.0
    """
    settings = arm.settings()
    if len(settings) == 1:
        return settings[0]
    scores = {setting: evaluate(setting, False) for setting in settings}
    for _ in range(MOST_EXTENSIONS):
        beyond = next_setting(best_setting(scores), list(scores))
        if beyond is None:
            break
        scores[beyond] = evaluate(beyond, True)
    return best_setting(scores)


def best_setting(scores: Mapping[Setting, Score]) -> Setting:
    """Return the setting with the lowest score; of equal ones that with the lowest lr.

    Example:
        >>> best_setting({Setting(0.1): (20.0, 1.0), Setting(0.01): (20.0, 1.0), Setting(1.0): (30.0, 0.5)}).lr
        0.01
    """
    return min(scores, key=lambda setting: (scores[setting], setting.lr))


def next_setting(best: Setting, tried: Sequence[Setting]) -> Setting | None:
    """Return the setting one factor beyond the edge at which the best lies, or None if it lies inside.

    The lr comes first; then, at the best lr, every option.

    Example:
        >>> next_setting(Setting(1.0), [Setting(0.01), Setting(0.1), Setting(1.0)])
        Setting(lr=10.0, options=())
        >>> next_setting(Setting(0.1), [Setting(0.01), Setting(0.1), Setting(1.0)]) is None
        True
    """
    lr = _beyond(best.lr, [setting.lr for setting in tried if setting.options == best.options])
    if lr is not None:
        return Setting(lr, best.options)
    for name, value in best.options:
        further = _beyond(value, [dict(setting.options)[name] for setting in tried])
        if further is not None:
            return Setting(best.lr, tuple(sorted({**dict(best.options), name: further}.items())))
    return None


def is_at_edge(best: Setting, tried: Sequence[Setting]) -> bool:
    """Return whether the best lies at an end of the lrs, or of an option's values, among those that were tried.

    Example:
        >>> is_at_edge(Setting(1.0), [Setting(0.1), Setting(1.0)]), is_at_edge(Setting(1.0), [Setting(1.0)])
        (True, False)
    """
    return next_setting(best, tried) is not None


def _beyond(best: float, tried: Sequence[float]) -> float | None:
    """Return the value that continues a geometric grid beyond the best at its edge, or None if the best is inside."""
    values = sorted(set(tried))
    if len(values) < 2 or values[0] < best < values[-1]:
        return None
    return round_lr(values[0] ** 2 / values[1] if best == values[0] else values[-1] ** 2 / values[-2])
