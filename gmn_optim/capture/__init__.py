"""From a model's forward and backward passes to decomposed gradients."""

from gmn_optim.capture import linear as linear
from gmn_optim.capture.adapters import register_layer as register_layer
from gmn_optim.capture.flow import LayerFlow as LayerFlow
from gmn_optim.capture.hooks import GradientCapture as GradientCapture
from gmn_optim.capture.verification import Verification as Verification
