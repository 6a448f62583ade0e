"""Settings of a meta-training run over a family of tasks."""

import math
from dataclasses import dataclass
from typing import Any

from gmn_optim.errors import InvalidArgumentError
from gmn_optim.metatrain.trainer_config import TrainerConfig

LATER_SETTINGS = {"averages": False}
"""Settings that older runs do not tell, with what they were then."""


@dataclass(frozen=True, kw_only=True)
class FamilyConfig(TrainerConfig):
    """Settings of :class:`TrainerConfig` and those that only a family of tasks has.

    ``unrolls`` counts the inner trainings of each slot, two for each antithetic pair; ``estimator`` is ``pes``.
    Every ``evaluate_every`` outer steps the meta-parameters are kept in a file, to be evaluated apart from training.

    Attributes:
        shortest_horizon: Least length of an inner training.
        longest_horizon: Largest length; lengths are log-uniform between.
        slots: Tasks under way at any time, each with pairs of its own.
        slots_per_step: Slots that an outer step takes forward by one truncation, in rotation.
        standardized: Whether the loss differences of a slot's pairs are divided by their root mean square, so that
            every task and every age counts alike.
        difference_floor: Least root mean square that they are divided by; 0.003 leaves out trainings that have failed,
            whose pairs differ by rounding errors alone.
        held_out_every: Inner steps between two measurements of the loss on held-out data, of which the meta-loss is
            made; 0 to make it of the training losses, which rewards memorizing.
        averages: Whether the averages of parameters are measured there, see :meth:`gmn_optim.GMNOptimizer.eval`.
        frozen: Patterns of names of meta-parameters that meta-training leaves as they are.

    Example:
        >>> FamilyConfig(slots=4, slots_per_step=2).pairs
        8
    """

    shortest_horizon: int = 200
    longest_horizon: int = 2_000
    slots: int = 8
    slots_per_step: int = 4
    standardized: bool = True
    difference_floor: float = 0.0
    held_out_every: int = 10
    averages: bool = False
    frozen: tuple[str, ...] = ("alpha.raw",)

    def __post_init__(self) -> None:
        super().__post_init__()
        faults = []
        if self.estimator != "pes":
            faults.append(f"estimator = {self.estimator!r} must be 'pes'")
        if self.unrolls % 2:
            faults.append(f"unrolls = {self.unrolls!r} must be even, two for each pair")
        if self.held_out_every < 0 or (self.held_out_every and self.truncation % self.held_out_every):
            faults.append(
                f"held_out_every = {self.held_out_every!r} must divide truncation = {self.truncation!r}, or be 0"
            )
        if self.averages and not self.held_out_every:
            faults.append(
                "averages = True needs held_out_every, losses of training are those of parameters in training"
            )
        if not 0 <= self.difference_floor < math.inf:
            faults.append(f"difference_floor = {self.difference_floor!r} must be 0 or positive")
        if not 1 <= self.slots_per_step <= self.slots:
            faults.append(f"slots_per_step = {self.slots_per_step!r} must be 1 to slots = {self.slots!r}")
        if faults:
            raise InvalidArgumentError("unusable settings for a family of tasks: " + "; ".join(faults))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a run records them: as older runs do, where they do not differ from these.

        Example:
            >>> ["averages" in FamilyConfig(averages=each).to_dict() for each in (False, True)]
            [False, True]
        """
        found = super().to_dict()
        return {name: value for name, value in found.items() if LATER_SETTINGS.get(name, ...) != value}

    @property
    def pairs(self) -> int:
        """Return the antithetic pairs of a slot."""
        return self.unrolls // 2

    def slots_of(self, step: int) -> list[int]:
        """Return the slots that the outer step number ``step``, counted from 0, takes forward.

        Example:
            >>> [FamilyConfig(slots=5, slots_per_step=2).slots_of(step) for step in range(3)]
            [[0, 1], [2, 3], [4, 0]]
        """
        first = step * self.slots_per_step
        return [(first + number) % self.slots for number in range(self.slots_per_step)]
