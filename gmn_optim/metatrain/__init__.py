"""Meta-training of update rules: tasks, unrolls, estimators of the meta-gradient, the outer loop."""

from gmn_optim.metatrain import backpropagation as backpropagation
from gmn_optim.metatrain import evolution as evolution
from gmn_optim.metatrain.estimators import AbstractGradientEstimator as AbstractGradientEstimator
from gmn_optim.metatrain.estimators import Horizons as Horizons
from gmn_optim.metatrain.estimators import MetaGradient as MetaGradient
from gmn_optim.metatrain.estimators import MetaShape as MetaShape
from gmn_optim.metatrain.estimators import estimators as estimators
from gmn_optim.metatrain.evaluation import Curves as Curves
from gmn_optim.metatrain.evaluation import evaluate as evaluate
from gmn_optim.metatrain.family_config import FamilyConfig as FamilyConfig
from gmn_optim.metatrain.family_trainer import FamilyTrainer as FamilyTrainer
from gmn_optim.metatrain.trainer import MetaTrainer as MetaTrainer
from gmn_optim.metatrain.trainer_config import TrainerConfig as TrainerConfig
from gmn_optim.metatrain.unroll import Unroll as Unroll
