"""Classifiers of images by small convolutional networks."""

import math
from collections.abc import Sequence

from torch import nn

from gmn_optim.errors import InvalidArgumentError
from gmn_optim.tasks.base import Batch
from gmn_optim.tasks.datasets import ImageData
from gmn_optim.tasks.image_mlp import labelled_images
from gmn_optim.tasks.mlp import activation_class, dashed
from gmn_optim.tasks.supervised import Examples, SupervisedTask, Variation, standardize

_POOLING: dict[str, type[nn.Module]] = {"max": nn.MaxPool2d, "average": nn.AvgPool2d}


class ImageCNNTask(SupervisedTask):
    """Convolutions of 3 x 3, each halving the side of the image, then a linear layer; cross-entropy loss.

    Args:
        data: Square images and labels; pixels are scaled to mean 0 and variance 1 over the training images.
        channels: Output channels of the convolutions.
        downsampling: ``stride``, or pooling by ``max`` or ``average``.
        readout: ``mean`` over the places, or ``flatten``.
        image_channels: Channels of an image.
        batch_size: Data points of a batch.
        horizon: Steps of a full training.
        activation: ``relu``, ``tanh``, ``gelu`` or ``silu``.
        variation: Changes of scale and labels.

    Raises:
        InvalidArgumentError: images are not square, or too small, or an option has another value.

    Example:
        >>> from gmn_optim.tasks.datasets import load_fashion_mnist_8x8
        >>> task = ImageCNNTask(load_fashion_mnist_8x8(), (4, 8), batch_size=2)
        >>> [type(layer).__name__ for layer in task.module]
        ['Conv2d', 'ReLU', 'Conv2d', 'ReLU', 'AdaptiveAvgPool2d', 'Flatten', 'Linear']
        >>> import torch
        >>> task.sample_batch(torch.Generator())[0].shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        data: ImageData,
        channels: Sequence[int] = (8, 16),
        downsampling: str = "stride",
        readout: str = "mean",
        image_channels: int = 1,
        batch_size: int = 64,
        horizon: int = 1_000,
        activation: str = "relu",
        variation: Variation | None = None,
    ) -> None:
        side = _side(data.train_images.shape[1], image_channels)
        self.image_shape = (image_channels, side, side)
        classes = int(data.train_labels.max()) + 1
        super().__init__(
            build_cnn(self.image_shape, channels, classes, downsampling, readout, activation),
            labelled_images(data),
            standardize(data.train_images),
            batch_size=batch_size,
            horizon=horizon,
            variation=variation,
        )
        self.name = f"cnn-{dashed(channels)}-{downsampling}-{readout}-{activation}-b{batch_size}{self.variation.suffix}"

    def prepare(self, examples: Examples) -> Batch:
        """Return images (..., channels, h, w) and labels (...)."""
        inputs, labels = super().prepare(examples)
        return inputs.unflatten(-1, self.image_shape), labels


def build_cnn(
    image_shape: tuple[int, int, int],
    channels: Sequence[int],
    classes: int,
    downsampling: str,
    readout: str,
    activation: str,
) -> nn.Sequential:
    """Return the network of :class:`ImageCNNTask`.

    Raises:
        InvalidArgumentError: an option has another value, or nothing is left of the image.

    Example:
        >>> build_cnn((3, 8, 8), (4,), 10, "max", "flatten", "relu")[-1].in_features
        64
    """
    if downsampling not in ("stride", *_POOLING) or readout not in ("mean", "flatten"):
        found = f"downsampling {downsampling!r} and readout {readout!r}"
        raise InvalidArgumentError(f"{found}; expected 'stride', 'max' or 'average', and 'mean' or 'flatten'")
    layers: list[nn.Module] = []
    width, side = image_shape[0], image_shape[1]
    for wider in channels:
        layers += [nn.Conv2d(width, wider, 3, 2 if downsampling == "stride" else 1, 1), activation_class(activation)()]
        layers += [_POOLING[downsampling](2)] if downsampling in _POOLING else []
        width, side = wider, (side + 1) // 2 if downsampling == "stride" else side // 2
    if side < 1:
        raise InvalidArgumentError(f"nothing is left of an image {image_shape} after {len(channels)} halvings")
    layers += [nn.AdaptiveAvgPool2d(1)] if readout == "mean" else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * (1 if readout == "mean" else side**2), classes))


def _side(pixels: int, channels: int) -> int:
    """Return the side of a square image, or raise :class:`InvalidArgumentError`."""
    side = math.isqrt(pixels // channels)
    if side**2 * channels != pixels:
        raise InvalidArgumentError(f"images have {pixels} values; expected {channels} channels of a square")
    return side
