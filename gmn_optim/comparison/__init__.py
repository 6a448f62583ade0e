"""An honest comparison of optimizers on tasks: every arm tuned on its own grid, in ordinary PyTorch training loops."""

from gmn_optim.comparison import own_arms as own_arms
from gmn_optim.comparison import package_arms as package_arms
from gmn_optim.comparison import torch_arms as torch_arms
from gmn_optim.comparison.arms import Arm as Arm
from gmn_optim.comparison.arms import OptimizerSet as OptimizerSet
from gmn_optim.comparison.arms import arms as arms
from gmn_optim.comparison.arms import register as register
from gmn_optim.comparison.kfac import KFAC as KFAC
from gmn_optim.comparison.protocol import Comparison as Comparison
from gmn_optim.comparison.protocol import compare as compare
from gmn_optim.comparison.protocol import report as report
from gmn_optim.comparison.record import Protocol as Protocol
