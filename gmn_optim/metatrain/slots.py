"""Slots of a run over a family: each trains pairs on one task in lock-step, then draws another task."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from gmn_optim.metatrain.estimators import Horizons, MetaShape
from gmn_optim.metatrain.evaluation import measure
from gmn_optim.metatrain.family_config import FamilyConfig
from gmn_optim.metatrain.seeds import derive_generator
from gmn_optim.metatrain.standardization import log_meta_loss
from gmn_optim.metatrain.unroll import Meta, Unroll
from gmn_optim.rule import UpdateRule
from gmn_optim.tasks.base import AbstractTask, Batch
from gmn_optim.tasks.family import AbstractTaskFamily

HELD_OUT = 256
"""Examples that a measurement for the meta-loss is made on."""


class SlotProgress(NamedTuple):
    """How far a slot is; every process knows it of every slot.

    Attributes:
        draw: Number of the task under way, -1 before the first.
        age: Inner steps that its trainings have taken.
        end: Their horizon.
    """

    draw: int = -1
    age: int = 0
    end: int = 0

    @property
    def is_over(self) -> bool:
        """Return whether the slot's next turn begins with a new task."""
        return self.age >= self.end

    def renewed(self, config: FamilyConfig, slot: int) -> "SlotProgress":
        """Return the progress at the start of the next task."""
        return SlotProgress(self.draw + 1, 0, draw_horizon(config, slot, self.draw + 1))


def draw_horizon(config: FamilyConfig, slot: int, draw: int) -> int:
    """Return the inner steps of a draw, whole truncations; first draws end early, at evenly spread ages.

    Example:
        >>> config = FamilyConfig(shortest_horizon=800, longest_horizon=800)
        >>> [draw_horizon(config, slot, draw=0) for slot in range(4)], draw_horizon(config, 0, draw=1)
        ([100, 200, 300, 400], 800)
    """
    generator = derive_generator(config.seed, "horizon", slot, draw)
    horizons = Horizons(config.shortest_horizon, config.longest_horizon)
    drawn = int(horizons.sample(generator, 1, config.truncation))
    share = (slot + 1) / config.slots if config.staggered and draw == 0 else 1.0
    return max(round(drawn * share / config.truncation), 1) * config.truncation


def draw_perturbations(config: FamilyConfig, slot: int, step: int, mask: Tensor) -> Tensor:
    """Return the perturbations of a slot's pairs at an outer step (pairs, m), zero where the mask (m) is."""
    generator = derive_generator(config.seed, "perturbations", slot, step)
    return torch.randn((config.pairs, len(mask)), generator=generator, dtype=mask.dtype) * config.sigma * mask


class Slot:
    """The task of one draw and its inner trainings, the first half of which are the positive sides of the pairs.

    Args:
        family: The task is drawn from it.
        rule: Trains.
        config: Settings.
        number: Of the slot.
        draw: Number of the task.
    """

    def __init__(
        self, family: AbstractTaskFamily, rule: UpdateRule, config: FamilyConfig, number: int, draw: int
    ) -> None:
        self.config = config
        self.place = (number, draw)
        self.task = family.sample(derive_generator(config.seed, "task", *self.place))
        self.unroll = Unroll(self.task, rule)
        start = self.unroll.start(derive_generator(config.seed, "start", *self.place), config.pairs)
        self.state = tree_map(lambda half: torch.cat([half, half]), start)

    def advance(
        self, shape: MetaShape, meta: Tensor, perturbations: Tensor, progress: SlotProgress
    ) -> tuple[Tensor, Tensor]:
        """Train for one truncation and return the meta-losses of the positive and negative sides (pairs) each.

        Args:
            shape: Of the meta-parameters.
            meta: Flat meta-parameters (m).
            perturbations: Of each pair (pairs, m).
            progress: Age and horizon before this truncation.
        """
        config = self.config
        generator = derive_generator(config.seed, "batches", *self.place, progress.age // config.truncation)
        batches = self.unroll.batches(generator, config.truncation, config.pairs)
        perturbed = shape.unflatten(torch.cat([meta + perturbations, meta - perturbations]))
        both = tuple(torch.cat([part, part], dim=1) for part in batches)
        losses = self._train(perturbed, both, generator)
        positive, negative = log_meta_loss(losses, self.task, progress.age, progress.end, config.emphasis).chunk(2)
        return positive, negative

    def _train(self, meta: Meta, batches: Batch, generator: torch.Generator) -> Tensor:
        """Train on all batches and return the losses that the meta-loss is made of (measurements, k)."""
        every = self.config.held_out_every
        if not every:
            self.state, losses = self.unroll.run(meta, self.state, batches)
            return losses
        held_out, found = draw_held_out(self.task, generator), []
        measured = meta if self.config.averages else None
        for some in zip(*(part.split(every) for part in batches), strict=True):
            self.state, _ = self.unroll.run(meta, self.state, some)
            found.append(measure(self.unroll, self.state, held_out, measured))
        return torch.stack(found)


def draw_held_out(task: AbstractTask, generator: torch.Generator) -> Batch:
    """Return at most :data:`HELD_OUT` random examples of a task's validation set; all of it if it is no such set.

    Example:
        >>> from gmn_optim.tasks import tasks
        >>> [len(part) for part in draw_held_out(tasks["fashion-mnist-mlp"](), torch.Generator())]
        [256, 256]
    """
    batch = task.held_out("validation")
    lengths = {len(part) if part.dim() else 0 for part in batch}
    if len(lengths) > 1 or max(lengths) <= HELD_OUT:
        return batch
    chosen = torch.randint(max(lengths), (HELD_OUT,), generator=generator)
    return tuple(part[chosen] for part in batch)
