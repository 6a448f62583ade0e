"""Evolution strategies with antithetic perturbations: truncated ES, and PES, which is unbiased."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from gmn_optim.errors import InvalidArgumentError
from gmn_optim.metatrain.estimators import AbstractGradientEstimator, MetaGradient, estimators, start_anew
from gmn_optim.metatrain.unroll import UnrollState


class EvolutionState(NamedTuple):
    """Pairs of inner trainings under way; the first half of every tensor's unrolls is the positive side.

    Attributes:
        unrolls: 2 x pairs inner trainings.
        perturbations: Sum of each pair's perturbations since its training began (pairs, m).
        ages: Inner steps since then (pairs).
        ends: Horizon of each pair (pairs).
    """

    unrolls: UnrollState
    perturbations: Tensor
    ages: Tensor
    ends: Tensor


class EvolutionStrategy(AbstractGradientEstimator):
    """``1 / (2 sigma^2) mean over pairs of (L+ - L-) xi``.

    Both sides of a pair see the same start and the same batches. With ``persistent``, xi is the sum of the pair's
    perturbations since its inner training began, which makes the estimate over a whole horizon unbiased (PES);
    otherwise xi is the newest one alone, which is blind to what earlier steps did to later ones (truncated ES).

    Reference:
        Vicol, Metz and Sohl-Dickstein (2021), "Unbiased gradient estimation in unrolled computation graphs with
        persistent evolution strategies", arXiv 2112.13835, algorithm 1.
    """

    def __init__(self, *args: Any, persistent: bool = True, **settings: Any) -> None:
        super().__init__(*args, **settings)
        if self.unrolls < 2 or self.unrolls % 2:
            raise InvalidArgumentError(f"antithetic pairs need an even number of unrolls, got {self.unrolls}")
        self.persistent = persistent
        self.pairs = self.unrolls // 2

    def init(self, generator: torch.Generator) -> EvolutionState:
        """Return fresh pairs."""
        size = sum(shape.numel() for shape in self.shape.shapes.values())
        started = self._start(generator)
        dtype = started.parameters[0].dtype
        ends = self.horizons.first(generator, self.pairs, self.truncation)
        return EvolutionState(started, torch.zeros(self.pairs, size, dtype=dtype), torch.zeros_like(ends), ends)

    def estimate(
        self, meta: Tensor, state: EvolutionState, generator: torch.Generator
    ) -> tuple[MetaGradient, EvolutionState]:
        """Return an estimate from one truncation of every pair."""
        state = self._renew(state, generator)
        noise = torch.randn(state.perturbations.shape, generator=generator, dtype=meta.dtype) * self.sigma
        batches = self.unroll.batches(generator, self.truncation, self.pairs)
        batches = tuple(torch.cat([part, part], dim=1) for part in batches)
        perturbed = self.shape.unflatten(torch.cat([meta + noise, meta - noise]))
        unrolls, losses = self.unroll.run(perturbed, state.unrolls, batches)
        positive, negative = self.meta_loss(losses, state.ages.repeat(2), state.ends.repeat(2)).chunk(2)
        total = state.perturbations + noise if self.persistent else noise
        gradient = ((positive - negative)[:, None] * total).mean(0) / (2 * self.sigma**2)
        estimate = MetaGradient(gradient, self.plain_loss(losses))
        return estimate, EvolutionState(unrolls, total, state.ages + self.truncation, state.ends)

    def _start(self, generator: torch.Generator) -> UnrollState:
        """Return fresh inner trainings, equal on both sides of every pair."""
        return tree_map(lambda half: torch.cat([half, half]), self.unroll.start(generator, self.pairs))

    def _renew(self, state: EvolutionState, generator: torch.Generator) -> EvolutionState:
        """Start pairs anew whose horizon is reached."""
        over = state.ages >= state.ends
        if not over.any():
            return state
        unrolls = start_anew(over.repeat(2), self._start(generator), state.unrolls)
        ends = torch.where(over, self.horizons.sample(generator, self.pairs, self.truncation), state.ends)
        perturbations = state.perturbations.masked_fill(over[:, None], 0.0)
        return EvolutionState(unrolls, perturbations, state.ages.masked_fill(over, 0), ends)


estimators.register("pes")(EvolutionStrategy)
estimators.register("truncated-es")(partial(EvolutionStrategy, persistent=False))
