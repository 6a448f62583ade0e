"""Evaluation: full inner trainings from scratch on given seeds, held-out loss along the way."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from tqdm import tqdm

from gmn_optim.metatrain.unroll import Meta, Unroll, UnrollState
from gmn_optim.tasks.base import Batch, Split


class Curves(NamedTuple):
    """Losses along inner trainings.

    Attributes:
        steps: Inner steps taken at each point (points).
        held_out: Loss on the held-out set (points, k); infinite where it is not a number.
        training: Mean training loss of the steps since the point before (points, k).

    Example:
        >>> curves = Curves(torch.tensor([0, 20]), torch.tensor([[2.0], [1.0]]), torch.tensor([[2.0], [1.5]]))
        >>> curves.steps_to(1.5).item(), curves.best().tolist()
        (20.0, [1.0])
    """

    steps: Tensor
    held_out: Tensor
    training: Tensor

    def best(self) -> Tensor:
        """Return each training's lowest held-out loss (k)."""
        return self.held_out.min(0).values

    def steps_to(self, target: float) -> Tensor:
        """Return the steps at which the mean curve over trainings is first at or below ``target`` ()."""
        reached = (self.held_out.mean(1) <= target).nonzero()
        return self.steps[reached[0, 0]].double() if len(reached) else torch.tensor(float("inf"))

    def steps_to_each(self, target: float) -> Tensor:
        """Return, for each training, the steps at which it is first at or below ``target`` (k), or infinity."""
        below = self.held_out <= target
        first = below.int().argmax(0)
        return torch.where(below.any(0), self.steps[first].double(), torch.inf)


def evaluate(
    unroll: Unroll,
    meta: Meta,
    seeds: Sequence[int],
    *,
    steps: int | None = None,
    every: int = 20,
    split: Split = "validation",
    averages: bool = False,
    progress: bool = False,
) -> Curves:
    """Train from scratch, once per seed, and return the curves.

    Args:
        unroll: Task and rule.
        meta: Meta-parameters, without a leading axis for one rule on all seeds, or with one (k) of a rule per seed.
        seeds: One per training; each decides initial parameters and batches. Equal seeds give equal tasks.
        steps: Inner steps; the task's horizon by default.
        every: Steps between two measurements.
        split: ``validation`` or ``test``.
        averages: Whether the averages of parameters are measured, see :meth:`gmn_optim.GMNOptimizer.eval`.
        progress: Whether to show a bar.

    Example:
        >>> from gmn_optim.rule import RuleConfig, UpdateRule
        >>> from gmn_optim.tasks.quadratic import QuadraticTask
        >>> unroll = Unroll(QuadraticTask(), UpdateRule(RuleConfig(body=None)))
        >>> curves = evaluate(unroll, unroll.meta_parameters(), seeds=[1, 2], every=10)
        >>> curves.steps.tolist(), tuple(curves.held_out.shape)
        ([0, 10, 20], (3, 2))
    """
    steps = steps or unroll.task.horizon
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    state = _start(unroll, generators)
    held_out = unroll.task.held_out(split)
    points, measured = [], meta if averages else None
    with torch.no_grad():
        points.append((0, measure(unroll, state, held_out, measured), torch.full((len(seeds),), torch.nan)))
        for done in tqdm(
            range(every, steps + 1, every), desc=f"evaluation on {split}", disable=not progress, leave=False
        ):
            batches = [unroll.task.sample_batch(generator, (every,)) for generator in generators]
            state, losses = unroll.run(
                meta, state, tuple(torch.stack(part, dim=1) for part in zip(*batches, strict=True))
            )
            points.append((done, measure(unroll, state, held_out, measured), losses.mean(0)))
    at, values, training = zip(*points, strict=True)
    return Curves(torch.tensor(at), torch.stack(values), torch.stack(training))


def measure(unroll: Unroll, state: UnrollState, batch: Batch, meta: Meta | None = None) -> Tensor:
    """Return the loss of every training on one batch (k), infinity instead of not a number.

    Args:
        unroll: Task and rule.
        state: Of the trainings.
        batch: What is measured on.
        meta: Meta-parameters of the rule, to measure the averages of parameters; None for parameters in training.
    """

    def loss(flat: tuple[Tensor, ...]) -> Tensor:
        return unroll.task.loss(unroll.unflatten(flat), batch)

    parameters = state.parameters if meta is None else unroll.averages(meta, state)
    return vmap(loss)(parameters).nan_to_num(nan=torch.inf)


def _start(unroll: Unroll, generators: Sequence[torch.Generator]) -> UnrollState:
    """Return one fresh training per generator."""
    states = [unroll.start(generator, 1) for generator in generators]
    leaves = [torch.utils._pytree.tree_leaves(state) for state in states]
    spec = torch.utils._pytree.tree_structure(states[0])
    return torch.utils._pytree.tree_unflatten([torch.cat(parts) for parts in zip(*leaves, strict=True)], spec)
