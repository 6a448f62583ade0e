"""Inner problems for meta-training and evaluation, by name."""

from gmn_optim.tasks import family as family
from gmn_optim.tasks import image_mlp as image_mlp
from gmn_optim.tasks import quadratic as quadratic
from gmn_optim.tasks.base import AbstractTask as AbstractTask
from gmn_optim.tasks.base import tasks as tasks
from gmn_optim.tasks.datasets import ImageData as ImageData
from gmn_optim.tasks.datasets import load_fashion_mnist_8x8 as load_fashion_mnist_8x8
from gmn_optim.tasks.family import AbstractTaskFamily as AbstractTaskFamily
from gmn_optim.tasks.family import families as families
