"""When a nominal term with bases looks at the factors, and when it makes bases anew."""

import torch
from torch import Tensor

FIRST_STEPS = 10
"""The basis is made anew at each of so many first steps, in which the averages change most."""

YOUNG, YOUNG_EVERY = 100, 10
"""Until this age, bases are made anew at least every so many steps."""

FOLLOW_EVERY, YOUNG_FOLLOW_EVERY = 10, 5
"""Factors are read, and second moments followed, at the first ten steps, then at every fifth, and from the hundredth at
every tenth. They change slowly, and the steps between cost neither hooks nor products of long sides."""


class LookSchedule:
    """Answers by the age of a basis, which is the number of steps that it has followed.

    Attributes:
        refresh_every: Steps between two bases, after the first ten steps. Until the hundredth it is ten at most.
        follow_every: Steps between two looks at the factors, after the first hundred steps. From the eleventh it is
            five at most.

    Example:
        >>> schedule = LookSchedule()
        >>> schedule.refresh_every, schedule.follow_every = 50, 10
        >>> [age for age in range(1, 141) if schedule.follows(age)][8:13]
        [9, 10, 15, 20, 25]
        >>> [age for age in range(1, 141) if schedule.is_due(age)][8:13]
        [9, 10, 20, 30, 40]
    """

    refresh_every: int
    follow_every: int

    def is_due(self, age: int | Tensor) -> bool | Tensor:
        """Return whether a basis is made anew at the step that is its ``age``-th."""
        young = (age <= YOUNG) & (age % min(self.refresh_every, YOUNG_EVERY) == 0)
        return (age <= FIRST_STEPS) | young | (age % self.refresh_every == 0)

    def follows(self, age: int | Tensor) -> bool | Tensor:
        """Return whether factors are read at the ``age``-th step of the bases."""
        young = (age <= YOUNG) & (age % self._young_follow_every == 0)
        return (age <= FIRST_STEPS) | young | (age % self.follow_every == 0) | self.is_due(age)

    def gap(self, age: Tensor) -> Tensor:
        """Return how many steps a look at the ``age``-th step stands for (): those since the look before."""
        before = age - 1
        young = before.clamp_max(YOUNG)
        last = before.clamp_max(FIRST_STEPS)
        for looked, every in (
            (young, self._young_follow_every),
            (young, min(self.refresh_every, YOUNG_EVERY)),
            (before, self.follow_every),
            (before, self.refresh_every),
        ):
            last = torch.maximum(last, looked // every * every)
        return age - last

    @property
    def _young_follow_every(self) -> int:
        """Return the steps between two looks until the hundredth."""
        return min(self.follow_every, YOUNG_FOLLOW_EVERY)
