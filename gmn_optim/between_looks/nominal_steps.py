"""The nominal term's steps between two looks, before they are averaged; nothing is changed yet."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gmn_optim.between_looks.held_matrices import ActiveByName, HeldMatrix, HeldParameter
from gmn_optim.rule.basis import into, out_of, preconditioned
from gmn_optim.rule.kronecker import MISSED_DECAY
from gmn_optim.rule.nominal import LEAST_SQUARE
from gmn_optim.rule.schedule_free import KroneckerScheduleFreeTerm


class NominalStep(NamedTuple):
    """The step of a matrix or a vector.

    Attributes:
        step: In its own coordinates, of a matrix (groups, o, i), of a vector (size).
        gradients: Of a matrix's weight and bias, or of the vector (size).
        seconds: Their new second moments, where these do not hold, in any shape.
    """

    step: Tensor
    gradients: list[Tensor]
    seconds: list[Tensor]


class NominalSteps:
    """Makes them, with the term's scalars as numbers of the host.

    Args:
        term: The nominal term.
        turns: Whether bases turn ().

    Example:
        >>> round(NominalSteps(KroneckerScheduleFreeTerm(), torch.tensor(True)).beta2, 6)
        0.995
    """

    def __init__(self, term: KroneckerScheduleFreeTerm, turns: Tensor) -> None:
        names = "beta", "beta2", "epsilon", "damping"
        self.beta, self.beta2, self.epsilon, self.damping = (term.scalar(name, turns).item() for name in names)
        self._largest_element = term.largest_element

    def of_matrix(self, each: HeldMatrix, active: ActiveByName, step_number: float) -> NominalStep:
        """Return the step of a matrix: preconditioners make it, or Adam in the bases.

        Args:
            each: The matrix.
            active: The parameters by name.
            step_number: Number of this step, 1 at the first.
        """
        gradients = [held.gradient(active) for held in each.parameters]
        gradient = each.matrix.joined(gradients)
        if each.has_preconditioners:
            return NominalStep(preconditioned(each.basis, gradient, self._largest_element), gradients, [])
        beta2 = min(self.beta2, MISSED_DECAY) if each.matrix.weight.missed else self.beta2
        turned = into(each.basis, gradient)
        second = torch.lerp(turned.square(), each.matrix.joined([held.second for held in each.parameters]), beta2)
        squares = (second / (1 - beta2**step_number)).clamp_min_(LEAST_SQUARE)
        floor = self.epsilon + self.damping * squares.mean().sqrt()
        return NominalStep(out_of(each.basis, turned / squares.sqrt_().add_(floor)), gradients, each.matrix.cut(second))

    def of_vectors(
        self, vectors: Sequence[HeldParameter], active: ActiveByName, step_number: float
    ) -> list[NominalStep]:
        """Return Adam's steps of all vectors, see :meth:`of_matrix`."""
        if not vectors:
            return []
        gradients = [held.gradient(active) for held in vectors]
        seconds = torch._foreach_mul([held.second for held in vectors], self.beta2)
        torch._foreach_addcmul_(seconds, gradients, gradients, 1 - self.beta2)
        roots = torch._foreach_div(seconds, 1 - self.beta2**step_number)
        torch._foreach_clamp_min_(roots, LEAST_SQUARE)
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, self.epsilon)
        steps = torch._foreach_div(gradients, roots)
        return [NominalStep(step, [own], [new]) for step, own, new in zip(steps, gradients, seconds, strict=True)]
