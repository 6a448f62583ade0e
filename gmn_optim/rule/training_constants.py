"""What stays as it is through a training: worked out at its first step."""

from collections.abc import Callable
from typing import Any, TypeVar

Made = TypeVar("Made")


class TrainingConstants:
    """Remembers what depends on sizes of weights at first alone, for a caller that takes the steps of one training.

    Example:
        >>> constants = TrainingConstants()
        >>> constants.once("answer", lambda: 42), constants.once("answer", lambda: 43)
        (42, 42)
    """

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def once(self, name: str, make: Callable[[], Made]) -> Made:
        """Return what ``make`` returned when it was first asked for by that name."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]
