"""Nominal terms: the hand-made optimizers that the learned term is added to."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gmn_optim.gradients import DecomposedGradient
from gmn_optim.registry import Registry
from gmn_optim.rule.basis import Basis
from gmn_optim.rule.coordinates import Coordinates
from gmn_optim.rule.layout import Layout
from gmn_optim.rule.scalars import Decay, LogScalar
from gmn_optim.rule.training_constants import TrainingConstants

Buffers = tuple[Tensor, ...]

LARGEST_ELEMENT = 4.0
"""Bound of the elements of steps that preconditioners make."""

LEAST_SQUARE = 1e-36
"""Roots are taken of at least this, far below epsilon's square: the slope of the root of zero is infinite."""


class ChunkInputs(NamedTuple):
    """What a nominal term makes a chunk's direction of: the arguments of :meth:`AbstractNominalTerm.direction`."""

    gradient: Tensor
    buffers: Buffers
    step: Tensor
    momentum: Tensor | None = None


class Surroundings(NamedTuple):
    """What a nominal term may look at that is not of one element.

    Attributes:
        layout: Which parameters stand where.
        factors: Layer name to factors, of the layers whose gradient they explain.
        refresh: Whether bases that are due are made anew; without it none is due.
        parameters: Flat parameters of each chunk (size).
        change: Changes the steps that a term takes in the coordinates of its bases; told ``follow``.
        follow: Whether second moments are followed at this step, and bases and the learned term look anew.
        sees: Whether there are factors to see then; without them bases and the learned term hold.
        turns: Whether bases are made anew at all (), None if so; otherwise they stay the axes.
        age: Which step of all bases this is, None where the host does not know.
        constants: Of this training; None to work them out.
    """

    layout: Layout
    factors: Mapping[str, DecomposedGradient]
    refresh: bool
    parameters: Sequence[Tensor] = ()
    change: Callable[[Sequence[Coordinates], bool], "Sequence[ChangedStep]"] | None = None
    follow: bool = True
    turns: Tensor | None = None
    sees: bool = True
    age: int | None = None
    constants: TrainingConstants | None = None

    @property
    def looks(self) -> bool:
        """Return whether bases and the learned term look anew."""
        return self.follow and self.sees

    def once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """Return what ``make`` returned at the first step of this training."""
        return make() if self.constants is None else self.constants.once(name, make)


class ChangedStep(NamedTuple):
    """What a learned term in the bases makes of a matrix's nominal step u.

    Attributes:
        step: ``(1 + gain) u`` where the guard allows it, else u (groups, o, i), up to the factor.
        factor: What the step is to be multiplied by (), None for one.
        gain: To be kept until the learned term looks again (groups, o, i), if it keeps gains.
        memory: What the learned term remembers of the matrix (m).
    """

    step: Tensor
    factor: Tensor | None
    gain: Tensor
    memory: Tensor


nominal_terms: Registry[type["AbstractNominalTerm"]] = Registry("nominal term")


class AbstractNominalTerm(nn.Module, ABC):
    """A pure direction from gradients, with meta-learned scalars.

    An elementwise term, whose elements do not see one another, defines :meth:`direction` alone. One that looks at
    whole matrices overrides :meth:`directions`, and the methods on its bases.

    Attributes:
        default_alpha: A sensible step size where the configuration names none.
        buffers_per_parameter: How many tensors like the parameter the state holds.
        uses_factors: Whether it looks at the factors of each data point's gradient.
        minds_small_weights: Whether networks most of whose weights are small by design keep the axes for bases.
        averages_steps: Whether parameters stand between the newest point and an average of all, the first buffer being
            how far the newest is from the average.
        makes_preconditioners: Whether steps of weights are gradients between preconditioners of rows and columns.
    """

    default_alpha: float
    buffers_per_parameter: int
    uses_factors: bool = False
    minds_small_weights: bool = False
    averages_steps: bool = False
    makes_preconditioners: bool = False

    @abstractmethod
    def direction(
        self, gradient: Tensor, buffers: Buffers, step: Tensor, momentum: Tensor | None = None
    ) -> tuple[Tensor, Buffers]:
        """Return the direction to be subtracted (size) and the new buffers.

        Args:
            gradient: Flat gradient (size).
            buffers: State, each (size), zero at first.
            step: Number of this step (), 1 at the first.
            momentum: Decay of the average of gradients (), in place of the meta-learned one.
        """

    def directions(
        self, chunks: Sequence[ChunkInputs], bases: tuple[Basis, ...], around: Surroundings
    ) -> tuple[list[tuple[Tensor, Buffers]], tuple[Basis, ...]]:
        """Return each chunk's direction (size) and new buffers, and the new bases.

        Args:
            chunks: Gradients and state of each chunk.
            bases: As :meth:`init_bases` or an earlier call returned them.
            around: Whatever else there is to see.
        """
        return [self.direction(*chunk) for chunk in chunks], bases

    def init_bases(self, layout: Layout, like: Tensor) -> tuple[Basis, ...]:
        """Return the bases before the first step; elementwise terms have none."""
        return ()

    def scalar(self, name: str, turns: Tensor | None) -> Tensor:
        """Return a meta-learned scalar by name (), for a model whose bases turn or, as ``turns`` () says, do not."""
        return getattr(self, name)()

    def average_shares(self, layout: Layout, bases: tuple[Basis, ...]) -> list[Tensor]:
        """Return what the average weighs in the parameters of each chunk (), known after the first step; or nothing."""
        return []

    def is_due(self, age: int | Tensor) -> bool | Tensor:
        """Return whether a basis is made anew at the step that is its ``age``-th, 1 at the first."""
        return False

    def follows(self, age: int | Tensor) -> bool | Tensor:
        """Return whether factors are read at the ``age``-th step of the bases, or at every step without bases."""
        return True


def largest_element_of(nominal: str) -> float:
    """Return the bound of elements that a nominal term is used with, by its name; 0 for none. Meta-training has none.

    Example:
        >>> largest_element_of("kronecker_schedule_free"), largest_element_of("adam")
        (4.0, 0.0)
    """
    return LARGEST_ELEMENT if nominal_terms[nominal].makes_preconditioners else 0.0


@nominal_terms.register("momentum")
class MomentumTerm(AbstractNominalTerm):
    """An exponential moving average of the gradient, ``v <- mu v + (1 - mu) g``; the direction is v.

    Equal to ``torch.optim.SGD`` with the same momentum and its lr times ``1 - mu``.
    """

    default_alpha = 0.1
    buffers_per_parameter = 1

    def __init__(self) -> None:
        super().__init__()
        self.momentum = Decay(0.9)

    def direction(
        self, gradient: Tensor, buffers: Buffers, step: Tensor, momentum: Tensor | None = None
    ) -> tuple[Tensor, Buffers]:
        """Return the averaged gradient."""
        mu = self.momentum() if momentum is None else momentum
        average = mu * buffers[0] + (1 - mu) * gradient
        return average, (average,)


@nominal_terms.register("adam")
class AdamTerm(AbstractNominalTerm):
    """Adam's direction with bias correction.

    Reference:
        Kingma and Ba (2015), "Adam", arXiv 1412.6980, algorithm 1.
    """

    default_alpha = 0.003
    buffers_per_parameter = 2

    def __init__(self) -> None:
        super().__init__()
        self.beta1 = Decay(0.9)
        self.beta2 = Decay(0.999)
        self.epsilon = LogScalar(1e-8)

    def direction(
        self, gradient: Tensor, buffers: Buffers, step: Tensor, momentum: Tensor | None = None
    ) -> tuple[Tensor, Buffers]:
        """Return ``m / (sqrt(v) + epsilon)``, both averages corrected for their start at zero."""
        beta1, beta2 = self.beta1() if momentum is None else momentum, self.beta2()
        first = beta1 * buffers[0] + (1 - beta1) * gradient
        second = beta2 * buffers[1] + (1 - beta2) * gradient.square()
        root = (second / (1 - torch.pow(beta2, step))).clamp_min(LEAST_SQUARE).sqrt()
        return first / (1 - torch.pow(beta1, step)) / (root + self.epsilon()), (first, second)
