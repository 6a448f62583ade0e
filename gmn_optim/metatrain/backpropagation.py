"""Truncated backpropagation through the unroll."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from gmn_optim.metatrain.estimators import AbstractGradientEstimator, MetaGradient, estimators, start_anew
from gmn_optim.metatrain.unroll import UnrollState


class BackpropagationState(NamedTuple):
    """Inner trainings under way (k), their ages and horizons (k)."""

    unrolls: UnrollState
    ages: Tensor
    ends: Tensor


@estimators.register("backprop")
class TruncatedBackpropagation(AbstractGradientEstimator):
    """The exact gradient of each truncation's mean loss with its start held fixed: blind beyond the truncation.

    Memory grows with the truncation. ``sigma`` is not used.

    Reference:
        Wu et al. (2018), "Understanding short-horizon bias in stochastic meta-optimization", arXiv 1803.02021.
    """

    def init(self, generator: torch.Generator) -> BackpropagationState:
        """Return fresh inner trainings."""
        ends = self.horizons.first(generator, self.unrolls, self.truncation)
        return BackpropagationState(self.unroll.start(generator, self.unrolls), torch.zeros_like(ends), ends)

    def estimate(self, meta: Tensor, state: Any, generator: torch.Generator) -> tuple[MetaGradient, Any]:
        """Return the gradient through one truncation of every training."""
        state = self._renew(state, generator)
        batches = self.unroll.batches(generator, self.truncation, self.unrolls)
        with torch.enable_grad():
            tracked = meta.detach().requires_grad_()
            unrolls, losses = self.unroll.run(self.shape.unflatten(tracked), state.unrolls, batches)
            loss = self.meta_loss(losses, state.ages, state.ends).mean()
            (gradient,) = torch.autograd.grad(loss, tracked, materialize_grads=True)
        unrolls = tree_map(Tensor.detach, unrolls)
        return MetaGradient(gradient, self.plain_loss(losses.detach())), BackpropagationState(
            unrolls, state.ages + self.truncation, state.ends
        )

    def _renew(self, state: BackpropagationState, generator: torch.Generator) -> BackpropagationState:
        """Start trainings anew whose horizon is reached."""
        over = state.ages >= state.ends
        if not over.any():
            return state
        unrolls = start_anew(over, self.unroll.start(generator, self.unrolls), state.unrolls)
        ends = torch.where(over, self.horizons.sample(generator, self.unrolls, self.truncation), state.ends)
        return BackpropagationState(unrolls, state.ages.masked_fill(over, 0), ends)
