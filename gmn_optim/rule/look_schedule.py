"""When a nominal term with bases looks at the factors, and when it makes bases anew."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gmn_optim.constants import constant_tensor

FIRST_LOOKS = (*range(1, 11), 13, 16, 20, 25, 30, 35, 40, 45, 50)
"""Steps at which factors are read and second moments followed while these change fast; then at every tenth. The steps
between cost neither hooks nor products of long sides."""

FIRST_BASES = (1, 2, 4, 7, 10, 20, 40, 70, 100)
"""Steps at which bases are made anew, for the same reason; then at every fiftieth."""

FOLLOW_EVERY = 10
"""Steps between two looks, after the first ones."""


class Look(NamedTuple):
    """How the bases of a matrix take part in a step: numbers and truths of the host where it knows, else tensors ().

    Attributes:
        follows: Whether factors are read.
        is_due: Whether the basis is made anew.
        gap: Steps that a look stands for.
    """

    follows: bool | Tensor
    is_due: bool | Tensor
    gap: int | Tensor


NO_LOOK = Look(False, False, 0)


class LookSchedule:
    """Answers by the age of a basis, which is the number of steps that it has followed.

    Attributes:
        refresh_every: Bases are made anew at multiples of this, and at :data:`FIRST_BASES`.
        follow_every: Factors are read at multiples of this, at :data:`FIRST_LOOKS`, and where bases are made anew.

    Example:
        >>> schedule = LookSchedule()
        >>> schedule.refresh_every, schedule.follow_every = 50, 10
        >>> [age for age in range(1, 81) if schedule.follows(age)][8:]
        [9, 10, 13, 16, 20, 25, 30, 35, 40, 45, 50, 60, 70, 80]
        >>> [age for age in range(1, 201) if schedule.is_due(age)]
        [1, 2, 4, 7, 10, 20, 40, 50, 70, 100, 150, 200]
    """

    refresh_every: int
    follow_every: int

    def is_due(self, age: int | Tensor) -> bool | Tensor:
        """Return whether a basis is made anew at the step that is its ``age``-th."""
        return _is_among(age, FIRST_BASES) | (age % self.refresh_every == 0)

    def follows(self, age: int | Tensor) -> bool | Tensor:
        """Return whether factors are read at the ``age``-th step of the bases."""
        return _is_among(age, FIRST_LOOKS) | (age % self.follow_every == 0) | self.is_due(age)

    def looks(self, ages: Sequence[Tensor], known: int | None = None) -> list[Look]:
        """Return how bases take part in a step, which is the ``known``-th of all, else the one after these ages ()."""
        if known is not None:
            return [Look(self.follows(known), self.is_due(known), self.gap(known))] * len(ages)
        return [Look(self.follows(age + 1), self.is_due(age + 1), self.gap(age + 1)) for age in ages]

    def gap(self, age: int | Tensor) -> int | Tensor:
        """Return how many steps a look at the ``age``-th step stands for (): those since the look before."""
        before = age - 1
        firsts = [_largest(FIRST_LOOKS, before), _largest(FIRST_BASES, before)]
        multiples = [before // every * every for every in (self.follow_every, self.refresh_every)]
        if isinstance(age, Tensor):
            return age - torch.stack([*firsts, *multiples]).amax(0)
        return age - max(*firsts, *multiples)


def _is_among(age: int | Tensor, steps: tuple[int, ...]) -> bool | Tensor:
    """Return whether an age is one of these steps."""
    if isinstance(age, Tensor):
        return (age.unsqueeze(-1) == _as_tensor(steps, age)).any(-1)
    return age in steps


def _largest(steps: tuple[int, ...], most: int | Tensor) -> int | Tensor:
    """Return the last of these steps that is not beyond, 0 if there is none."""
    if isinstance(most, Tensor):
        known = _as_tensor(steps, most)
        return (known * (known <= most.unsqueeze(-1))).amax(-1)
    return max((step for step in steps if step <= most), default=0)


def _as_tensor(steps: tuple[int, ...], like: Tensor) -> Tensor:
    """Return steps as a tensor (s)."""
    return constant_tensor(tuple(map(float, steps)), like.dtype, like.device)


def choose(condition: bool | Tensor, new: Tensor, old: Tensor | float) -> Tensor | float:
    """Return the new value where the condition holds, else the old one, without an operation where the host knows.

    Example:
        >>> choose(True, torch.ones(()), 0.0), choose(torch.tensor(False), torch.ones(()), 0.0)
        (tensor(1.), tensor(0.))
    """
    if isinstance(condition, Tensor):
        return torch.where(condition, new, old)
    return new if condition else old
