"""A learned optimizer in Adam's place: ``GMNOptimizer(model)``."""

from gmn_optim.capture import GradientCapture as GradientCapture
from gmn_optim.errors import CaptureWarning as CaptureWarning
from gmn_optim.errors import GMNError as GMNError
from gmn_optim.gradients import DecomposedGradient as DecomposedGradient
from gmn_optim.gradients import GradientSet as GradientSet
from gmn_optim.optimizer import GMNOptimizer as GMNOptimizer
from gmn_optim.version import __version__ as __version__
from gmn_optim.weights import Weights as Weights
from gmn_optim.weights import WeightsCard as WeightsCard
from gmn_optim.weights import list_weights as list_weights
from gmn_optim.weights import load_weights as load_weights
from gmn_optim.weights import save_weights as save_weights

__all__ = [
    "CaptureWarning",
    "DecomposedGradient",
    "GMNError",
    "GMNOptimizer",
    "GradientCapture",
    "GradientSet",
    "Weights",
    "WeightsCard",
    "list_weights",
    "load_weights",
    "save_weights",
]
