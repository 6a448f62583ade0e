"""Smaller versions of images, by area averaging."""

import torch
from torch import Tensor

from gmn_optim.tasks.datasets import ImageData


def area_average(images: Tensor, side: int) -> Tensor:
    """Return square images (..., h, h) at another side (..., side, side) uint8: the mean of what lies under a pixel.

    An old pixel that is cut counts by its area; means are rounded to the nearest level.

    Example:
        >>> area_average(torch.tensor([[0, 2], [4, 6]], dtype=torch.uint8), 1).tolist()
        [[3]]
    """
    large = images.shape[-1]
    weights = _overlaps(side, large)
    # in pieces: as floats all images at once would take four times their memory
    pieces = images.reshape(-1, large, large).split(10_000)
    # whole numbers below 2**24 are exact in float32
    means = [(weights @ piece.float() @ weights.T / large**2).round().to(torch.uint8) for piece in pieces]
    return torch.cat(means).reshape(*images.shape[:-2], side, side)


def resize_images(data: ImageData, side: int, channels: int = 1) -> ImageData:
    """Return a data set with its square images at another side.

    Example:
        >>> from gmn_optim.tasks.datasets import load_fashion_mnist_8x8, subset
        >>> resize_images(subset(load_fashion_mnist_8x8(), 0, 80), 4).train_images.shape
        torch.Size([70, 16])
    """

    def resized(images: Tensor) -> Tensor:
        old = round((images.shape[1] // channels) ** 0.5)
        return area_average(images.unflatten(1, (channels, old, old)), side).flatten(1)

    return ImageData(resized(data.train_images), data.train_labels, resized(data.test_images), data.test_labels)


def _overlaps(small: int, large: int) -> Tensor:
    """Return how much each of ``small`` equal parts of a line overlaps each of ``large``, each row summing to it."""
    parts, pixels = torch.arange(small).unsqueeze(1), torch.arange(large)
    start = torch.maximum(parts * large, pixels * small)
    stop = torch.minimum((parts + 1) * large, (pixels + 1) * small)
    return (stop - start).clamp_min(0).float()
