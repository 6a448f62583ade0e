"""Small classifiers of images: the paper's MLPs on Fashion-MNIST at 8x8."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gmn_optim.tasks.base import AbstractTask, Batch, Parameters, Split, tasks
from gmn_optim.tasks.datasets import ImageData, load_fashion_mnist_8x8

VALIDATION_IMAGES = 5_000
"""The last training images, which no inner training sees: checkpoints are chosen on them."""

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU}


class ImageMLPTask(AbstractTask):
    """A ReLU (or other) MLP on flattened images, cross-entropy loss.

    Args:
        data: Images and labels; pixels are shifted and scaled to mean 0 and variance 1 over the training images.
        hidden: Widths of the hidden layers.
        batch_size: Data points of a batch.
        horizon: Steps of a full training.
        activation: ``relu``, ``tanh``, ``gelu`` or ``silu``.

    Example:
        >>> task = ImageMLPTask(load_fashion_mnist_8x8(), batch_size=4)
        >>> generator = torch.Generator().manual_seed(0)
        >>> [tuple(part.shape) for part in task.sample_batch(generator, (3,))]
        [(3, 4, 64), (3, 4)]
    """

    def __init__(
        self,
        data: ImageData,
        hidden: Sequence[int] = (32,),
        batch_size: int = 128,
        horizon: int = 2_000,
        activation: str = "relu",
    ) -> None:
        classes = int(data.train_labels.max()) + 1
        widths = [data.train_images.shape[1], *hidden, classes]
        self.name = "image-mlp"
        self.module = _mlp(widths, _ACTIVATIONS[activation])
        self.batch_size = batch_size
        self.horizon = horizon
        self.loss_limit = 1.3 * math.log(classes)
        self._data = data
        self._std, self._mean = torch.std_mean(data.train_images.float())
        self._train_images = self._standardized(data.train_images[:-VALIDATION_IMAGES])
        self._train_labels = data.train_labels[:-VALIDATION_IMAGES]

    def init_parameters(self, generator: torch.Generator) -> Parameters:
        """Return weights and biases drawn as ``nn.Linear`` does: uniform within 1 / sqrt(inputs)."""
        parameters = {}
        bound = 1.0
        for name, parameter in self.module.named_parameters():
            if parameter.dim() == 2:  # a bias comes after its weight and shares its bound
                bound = 1 / math.sqrt(parameter.shape[1])
            parameters[name] = (torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound
        return parameters

    def sample_batch(self, generator: torch.Generator, shape: tuple[int, ...] = ()) -> Batch:
        """Return images (*shape, b, pixels) and labels (*shape, b), drawn with replacement."""
        chosen = torch.randint(len(self._train_labels), (*shape, self.batch_size), generator=generator)
        return self._train_images[chosen], self._train_labels[chosen]

    def loss(self, parameters: Parameters, batch: Batch) -> Tensor:
        """Return the mean cross-entropy ()."""
        images, labels = batch
        return nn.functional.cross_entropy(torch.func.functional_call(self.module, parameters, (images,)), labels)

    def held_out(self, split: Split) -> Batch:
        """Return all validation images (5,000) or all test images (10,000) with their labels."""
        if split == "test":
            return self._standardized(self._data.test_images), self._data.test_labels
        held = slice(-VALIDATION_IMAGES, None)
        return self._standardized(self._data.train_images[held]), self._data.train_labels[held]

    def _standardized(self, images: Tensor) -> Tensor:
        """Return pixels 0..255 with mean 0 and variance 1 over the training set."""
        return (images.float() - self._mean) / self._std


def _mlp(widths: Sequence[int], activation: type[nn.Module]) -> nn.Sequential:
    """Return an MLP with these widths, an activation between each two layers."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*layers[:-1])


@tasks.register("fashion-mnist-mlp")
class FashionMNISTTask(ImageMLPTask):
    """The paper's Fashion-MNIST task: 8x8 images, one hidden layer of 32, ReLU, batch 128, 2,000 steps."""

    def __init__(self) -> None:
        super().__init__(load_fashion_mnist_8x8())
