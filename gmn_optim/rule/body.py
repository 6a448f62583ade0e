"""Bodies: the learned function from a parameter's features to its step."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from gmn_optim.nn.product import FeatureRun
from gmn_optim.registry import Registry
from gmn_optim.rule.coordinates import Coordinates
from gmn_optim.rule.falling_bound import FallingBound
from gmn_optim.rule.features import TIME_SCALES
from gmn_optim.rule.matrices import Matrix

bodies: Registry[type[nn.Module]] = Registry("body")
"""Those that read parameters, :class:`AbstractBody`, and those that read matrices, :class:`AbstractMatrixBody`."""


class AbstractBody(nn.Module, ABC):
    """A map from features of parameters to outputs, zero before any meta-training."""

    @abstractmethod
    def forward(self, parameters: Tensor, time: Tensor, around: Sequence[FeatureRun]) -> Tensor:
        """Return outputs (size, outputs).

        Args:
            parameters: Features of the parameters (size, c).
            time: Features of the step (11).
            around: What GradMetaNet makes of the neurons on either side of each parameter, (., width) for
                consecutive runs of parameters; empty without GradMetaNet.
        """


class MatrixChange(NamedTuple):
    """What a body makes of a matrix.

    Attributes:
        gain: What is added to the nominal step, as a share of it (groups, o, i), or one number for all ().
        memory: What is remembered of the matrix (m).
    """

    gain: Tensor
    memory: Tensor


class AbstractMatrixBody(nn.Module, ABC):
    """Changes the steps that a nominal term takes in the bases of matrices; not at all before any meta-training.

    Attributes:
        buffers_per_parameter: 2 to find a moving average of the noise of each coordinate, and its own gains again.
        memory_per_matrix: How many numbers it remembers of every matrix.
        takes_gradmetanet: Whether a GradMetaNet may read for it.
    """

    buffers_per_parameter: int = 0
    memory_per_matrix: int = 0
    takes_gradmetanet: bool = True

    @abstractmethod
    def forward(
        self, turned: Sequence[Coordinates], parameters: Sequence[Tensor], matrices: Sequence[Matrix], alpha: Tensor
    ) -> list[MatrixChange]:
        """Return what a look at the factors makes of each matrix.

        Args:
            turned: Matrices whose gradients factors explain, each in its bases.
            parameters: Of each, in their own coordinates (groups, o, i).
            matrices: All matrices of the model.
            alpha: Step size ().
        """

    def set_up(self, setpoint: float, bound: FallingBound) -> None:
        """Take what a configuration says of controllers, and the bound of their pace; others have nothing to set up."""

    @abstractmethod
    def hold(self, turned: Sequence[Coordinates], matrices: Sequence[Matrix]) -> list[MatrixChange]:
        """Return what is made between two looks of matrices that the body serves, among all of the model."""


@bodies.register("ds")
class PerParameterMLP(AbstractBody):
    """DS: one MLP for every parameter by itself, three hidden layers of 32 in the paper.

    Each group of inputs has a weight matrix of its own in the first layer, which is the product with their
    concatenation without building it. GradMetaNet's product layer ends in that matrix, so it writes ``width`` channels.

    Reference:
        Gelberg et al. (2025), arXiv 2507.01649, section 7.2 and appendix F.2.
    """

    def __init__(self, channels: int, outputs: int, width: int, depth: int) -> None:
        super().__init__()
        self.from_parameters = nn.Linear(channels, width)
        self.from_time = nn.Linear(len(TIME_SCALES), width, bias=False)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.output = nn.Linear(width, outputs)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, parameters: Tensor, time: Tensor, around: Sequence[FeatureRun]) -> Tensor:
        """Return outputs (size, outputs)."""
        # biases join the time term and sums are in place: the large tensor is written, not copied
        hidden = nn.functional.linear(parameters, self.from_parameters.weight)
        start = 0
        for features, repeats in around:
            stop = start + repeats * features.shape[0]
            hidden[start:stop].unflatten(0, (repeats, -1)).add_(features)
            start = stop
        hidden = hidden.add_(self.from_time(time) + self.from_parameters.bias).relu_()
        for layer in self.hidden:
            hidden = nn.functional.linear(hidden, layer.weight).add_(layer.bias).relu_()
        return self.output(hidden)
