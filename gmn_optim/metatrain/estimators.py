"""Estimators of the meta-gradient: one interface, one file each."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from gmn_optim.metatrain.unroll import Meta, UnrollState
from gmn_optim.registry import Registry
from gmn_optim.tasks.base import AbstractTask, Batch


class MetaGradient(NamedTuple):
    """An estimate of the gradient of the meta-loss.

    Attributes:
        gradient: With respect to the flat meta-parameters (m).
        loss: Mean inner training loss of the unrolls that it came from, not weighted ().

    Example:
        >>> MetaGradient(torch.zeros(3), torch.tensor(0.5)).loss.item()
        0.5
    """

    gradient: Tensor
    loss: Tensor


class Trainable(Protocol):
    """What an estimator asks of an unroll: inner trainings that start, and run on given batches."""

    task: AbstractTask

    def start(self, generator: torch.Generator, unrolls: int) -> UnrollState:
        """Return fresh inner trainings."""
        ...

    def batches(self, generator: torch.Generator, steps: int, unrolls: int) -> Batch:
        """Return training batches (steps, unrolls, ...)."""
        ...

    def run(self, meta: Meta, state: UnrollState, batches: Batch) -> tuple[UnrollState, Tensor]:
        """Return the trainings after these batches, and their losses (steps, k)."""
        ...


class Horizons(NamedTuple):
    """How long inner trainings run before they start anew, in whole truncations.

    Attributes:
        shortest: Least number of inner steps.
        longest: Largest; equal to ``shortest`` for constant horizons, otherwise lengths are log-uniform between.
        staggered: Whether the very first trainings end early, at evenly spread ages, so that those under way are of
            all ages at any time.

    Reference:
        Metz et al. (2022), arXiv 2203.11860, appendix, for log-uniform horizons and staggered starts.

    Example:
        >>> Horizons(100, 100).sample(torch.Generator(), count=2, truncation=50).tolist()
        [100, 100]
        >>> Horizons(100, 100).first(torch.Generator(), count=2, truncation=50).tolist()
        [50, 100]
    """

    shortest: int
    longest: int
    staggered: bool = True

    def sample(self, generator: torch.Generator, count: int, truncation: int) -> Tensor:
        """Return ``count`` numbers of inner steps, multiples of ``truncation`` (count)."""
        low, high = torch.tensor([self.shortest, self.longest], dtype=torch.float64).log()
        drawn = torch.exp(low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64))
        return (drawn / truncation).round().clamp_min(1).long() * truncation

    def first(self, generator: torch.Generator, count: int, truncation: int) -> Tensor:
        """Return the horizons of the very first trainings (count)."""
        horizons = self.sample(generator, count, truncation)
        if not self.staggered:
            return horizons
        shares = (torch.arange(count, dtype=torch.float64) + 1) / count
        return (horizons * shares / truncation).round().clamp_min(1).long() * truncation


class MetaShape:
    """Translates between named meta-parameters and one flat vector.

    Example:
        >>> shape = MetaShape({"a": torch.zeros(2), "b": torch.zeros(())})
        >>> shape.unflatten(torch.tensor([1.0, 2.0, 3.0]))["b"]
        tensor(3.)
    """

    def __init__(self, meta: Meta) -> None:
        self.shapes = {name: value.shape for name, value in meta.items()}

    def flatten(self, meta: Meta) -> Tensor:
        """Return named meta-parameters as one vector (m)."""
        return torch.cat([meta[name].reshape(-1) for name in self.shapes])

    def unflatten(self, vectors: Tensor) -> Meta:
        """Return vectors (..., m) as named meta-parameters with the same leading axes."""
        pieces = vectors.split([shape.numel() for shape in self.shapes.values()], dim=-1)
        leading = vectors.shape[:-1]
        return {
            name: piece.reshape((*leading, *shape))
            for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }


class AbstractGradientEstimator(ABC):
    """Estimates the gradient of the mean inner training loss with respect to the meta-parameters.

    Args of every estimator:
        unroll: Runs inner trainings.
        shape: Of the meta-parameters.
        unrolls: Number of inner trainings side by side.
        truncation: Inner steps for each estimate.
        horizons: When trainings start anew.
        sigma: Standard deviation of the perturbations, where there are any.
        emphasis: A loss at step t of T weighs (emphasis + 1) (t/T)^emphasis: 0 for the mean over the horizon, more
            for what is reached late.

    Example:
        >>> class Nothing(AbstractGradientEstimator):
        ...     def init(self, generator):
        ...         return ()
        ...     def estimate(self, meta, state, generator):
        ...         return MetaGradient(torch.zeros_like(meta), torch.zeros(())), state
    """

    def __init__(
        self,
        unroll: Trainable,
        shape: MetaShape,
        *,
        unrolls: int = 16,
        truncation: int = 50,
        horizons: Horizons,
        sigma: float = 0.01,
        emphasis: float = 0.0,
    ) -> None:
        self.unroll = unroll
        self.shape = shape
        self.unrolls = unrolls
        self.truncation = truncation
        self.horizons = horizons
        self.sigma = sigma
        self.emphasis = emphasis

    @abstractmethod
    def init(self, generator: torch.Generator) -> Any:
        """Return the estimator's state, a tree of tensors, before the first estimate."""

    @abstractmethod
    def estimate(self, meta: Tensor, state: Any, generator: torch.Generator) -> tuple[MetaGradient, Any]:
        """Return an estimate at the flat meta-parameters (m), and the next state."""

    def meta_loss(self, losses: Tensor, ages: Tensor, ends: Tensor) -> Tensor:
        """Return the weighted mean over the steps of a truncation of losses (steps, k), for each training (k).

        Losses above the task's limit or not finite count as the limit.

        Args:
            losses: Of the steps of this truncation (steps, k).
            ages: Steps that each training had taken before it (k).
            ends: Horizon of each training (k).
        """
        return weighted_mean(bounded(losses, self.unroll.task.loss_limit), ages, ends, self.emphasis)

    def plain_loss(self, losses: Tensor) -> Tensor:
        """Return the mean of losses (steps, k), bounded but not weighted: what a log shows ()."""
        return bounded(losses, self.unroll.task.loss_limit).mean()


def bounded(losses: Tensor, limit: float) -> Tensor:
    """Return losses with ``limit`` for those that are above it or not finite.

    Example:
        >>> bounded(torch.tensor([1.0, 9.0, torch.nan, -torch.inf]), limit=2.0)
        tensor([1., 2., 2., 2.])
    """
    return losses.nan_to_num(nan=limit, posinf=limit, neginf=limit).clamp_max(limit)


def weighted_mean(losses: Tensor, ages: Tensor, ends: Tensor, emphasis: float) -> Tensor:
    """Return the mean (k) of losses (steps, k), the one at step t of T weighed by (emphasis + 1) (t/T)^emphasis.

    Args:
        losses: Of the steps of a truncation (steps, k).
        ages: Steps that were taken before it (k).
        ends: Horizons (k).
        emphasis: 0 for the plain mean.

    Example:
        >>> weighted_mean(torch.ones(2, 1), torch.tensor([0]), torch.tensor([2]), emphasis=1.0)
        tensor([1.])
    """
    if emphasis == 0.0:
        return losses.mean(0)
    share = (ages + torch.arange(len(losses)).unsqueeze(1) + 0.5) / ends
    return ((emphasis + 1) * share.to(losses.dtype) ** emphasis * losses).mean(0)


def start_anew(over: Tensor, fresh: UnrollState, old: UnrollState) -> UnrollState:
    """Return the old inner trainings with those that are over (k) replaced by fresh ones."""

    def choose(new: Tensor, kept: Tensor) -> Tensor:
        return torch.where(over.view(-1, *[1] * (kept.dim() - 1)), new, kept)

    return tree_map(choose, fresh, old)


estimators: Registry[Callable[..., AbstractGradientEstimator]] = Registry("meta-gradient estimator")
