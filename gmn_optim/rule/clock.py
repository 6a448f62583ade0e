"""When factors are read and bases made anew: a count on the host, so that no step waits for the device to tell."""

from gmn_optim.rule.nominal import AbstractNominalTerm
from gmn_optim.rule.update import RuleState


class RefreshClock:
    """Counts the ages of bases, and says at which steps factors are read and one is made anew.

    Args:
        nominal: Has the schedule.
        state: The rule's state, of one training or of many; its ages are read once.

    Example:
        >>> from gmn_optim.rule import Layout, RuleConfig, UpdateRule
        >>> rule = UpdateRule(RuleConfig(nominal="adam", body=None))
        >>> RefreshClock(rule.nominal, rule.init_state(Layout(()))).is_due
        False
    """

    def __init__(self, nominal: AbstractNominalTerm, state: RuleState) -> None:
        self._nominal = nominal
        self._ages = sorted({int(age) for basis in state.bases for age in basis.age.detach().flatten().tolist()})

    @property
    def is_due(self) -> bool:
        """Whether a basis is made anew at the coming step."""
        return any(self._nominal.is_due(age + 1) for age in self._ages)

    @property
    def follows(self) -> bool:
        """Whether factors are read at the coming step."""
        return any(bool(self._nominal.follows(age + 1)) for age in self._ages or [0])

    @property
    def age(self) -> int | None:
        """Which step of the bases the coming one is, None if they are of several ages or there are none."""
        return self._ages[0] + 1 if len(self._ages) == 1 else None

    def advance(self) -> None:
        """Count a step."""
        self._ages = [age + 1 for age in self._ages]
