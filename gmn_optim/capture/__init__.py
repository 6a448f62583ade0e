"""From a model's forward and backward passes to decomposed gradients."""

from gmn_optim.capture import attention as attention
from gmn_optim.capture import convolution as convolution
from gmn_optim.capture import embedding as embedding
from gmn_optim.capture import linear as linear
from gmn_optim.capture import normalization as normalization
from gmn_optim.capture.adapters import AbstractLayerAdapter as AbstractLayerAdapter
from gmn_optim.capture.adapters import register_layer as register_layer
from gmn_optim.capture.adapters import supported_layers as supported_layers
from gmn_optim.capture.functional import CapturedGradients as CapturedGradients
from gmn_optim.capture.functional import CapturePlan as CapturePlan
from gmn_optim.capture.functional import capture_gradients as capture_gradients
from gmn_optim.capture.functional import plan_capture as plan_capture
from gmn_optim.capture.hooks import GradientCapture as GradientCapture
from gmn_optim.capture.verification import Verification as Verification
