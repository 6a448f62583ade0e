"""Regressions whose targets are pixels: one half of an image from the other, and an image from itself."""

from collections.abc import Sequence

from torch import Tensor

from gmn_optim.tasks.datasets import ImageData
from gmn_optim.tasks.mlp import build_mlp, dashed
from gmn_optim.tasks.supervised import Examples, SupervisedTask, Variation, split_examples, standardize


class InpaintingTask(SupervisedTask):
    """An MLP that predicts the lower half of an image from the upper half, mean squared error.

    Args:
        data: Images; pixels are shifted and scaled to mean 0 and variance 1 over the training images.
        hidden: Widths of the hidden layers.
        batch_size: Data points of a batch.
        horizon: Steps of a full training.
        activation: ``relu``, ``tanh``, ``gelu`` or ``silu``.
        variation: Changes of scale.

    Example:
        >>> from gmn_optim.tasks.datasets import load_fashion_mnist_8x8
        >>> task = InpaintingTask(load_fashion_mnist_8x8(), (16,))
        >>> task.module[0].in_features, task.module[-1].out_features
        (32, 32)
    """

    def __init__(
        self,
        data: ImageData,
        hidden: Sequence[int] = (64,),
        batch_size: int = 128,
        horizon: int = 1_000,
        activation: str = "relu",
        variation: Variation | None = None,
    ) -> None:
        pixels = data.train_images.shape[1]
        seen = pixels // 2
        scaling = standardize(data.train_images)
        train, test = (Examples(images[:, :seen], images[:, seen:]) for images in (data.train_images, data.test_images))
        super().__init__(
            build_mlp([seen, *hidden, pixels - seen], activation),
            split_examples(train, test),
            scaling,
            scaling,
            batch_size=batch_size,
            horizon=horizon,
            variation=variation,
        )
        self.name = f"inpainting-{dashed(hidden)}-{activation}-b{batch_size}{self.variation.suffix}"


class AutoencoderTask(SupervisedTask):
    """An MLP that predicts an image from itself through a bottleneck, mean squared error.

    Args:
        data: Images; pixels are shifted and scaled to mean 0 and variance 1 over the training images.
        hidden: Widths of the hidden layers, the bottleneck among them.
        batch_size: Data points of a batch.
        horizon: Steps of a full training.
        activation: ``relu``, ``tanh``, ``gelu`` or ``silu``.
        variation: Changes of scale.

    Example:
        >>> from gmn_optim.tasks.datasets import load_fashion_mnist_8x8
        >>> AutoencoderTask(load_fashion_mnist_8x8(), (32, 8, 32)).name
        'autoencoder-32-8-32-relu-b128'
    """

    def __init__(
        self,
        data: ImageData,
        hidden: Sequence[int] = (64, 16, 64),
        batch_size: int = 128,
        horizon: int = 1_000,
        activation: str = "relu",
        variation: Variation | None = None,
    ) -> None:
        pixels = data.train_images.shape[1]
        scaling = standardize(data.train_images)
        super().__init__(
            build_mlp([pixels, *hidden, pixels], activation),
            split_examples(_reproduced(data.train_images), _reproduced(data.test_images)),
            scaling,
            scaling,
            batch_size=batch_size,
            horizon=horizon,
            variation=variation,
        )
        self.name = f"autoencoder-{dashed(hidden)}-{activation}-b{batch_size}{self.variation.suffix}"


def _reproduced(images: Tensor) -> Examples:
    """Return images as inputs and as targets."""
    return Examples(images, images)
