"""Tasks on which learned optimizers are chosen: data of the package that no sampled task sees, in other networks."""

import functools

from gmn_optim.tasks.byte_transformer import ByteTransformerTask
from gmn_optim.tasks.datasets import (
    ImageData,
    TableData,
    load_fashion_mnist_14x14,
    load_letters,
    load_photograph,
    load_text,
    subset,
)
from gmn_optim.tasks.image_cnn import ImageCNNTask
from gmn_optim.tasks.image_fit import ImageFitTask
from gmn_optim.tasks.image_mlp import ImageMLPTask
from gmn_optim.tasks.image_regression import AutoencoderTask, InpaintingTask
from gmn_optim.tasks.named_tasks import Builder, register_tasks
from gmn_optim.tasks.resizing import resize_images
from gmn_optim.tasks.tabular_mlp import TabularMLPTask
from gmn_optim.tasks.window_mlp import WindowMLPTask


@functools.lru_cache(maxsize=4)
def validation_images(side: int) -> ImageData:
    """Return the images of Fashion-MNIST from 20,000 to 30,000.

    Example:
        >>> validation_images(14).train_images.shape
        torch.Size([8750, 196])
    """
    data = subset(load_fashion_mnist_14x14(), 20_000, 30_000)
    return data if side == 14 else resize_images(data, side)


def validation_letters(number: int = 6_000) -> TableData:
    """Return so many rows of the letters from 10,000 on.

    Example:
        >>> validation_letters().test_features.shape
        torch.Size([750, 16])
    """
    return subset(load_letters(), 10_000, 10_000 + number)


def few_validation_images() -> ImageData:
    """Return 1,600 images of Fashion-MNIST at 8x8, which a small network can learn by heart.

    Example:
        >>> few_validation_images().train_images.shape
        torch.Size([1400, 64])
    """
    return resize_images(subset(load_fashion_mnist_14x14(), 20_000, 21_600), 8)


META_VALIDATION_TASKS: dict[str, Builder] = {
    "validation-fmnist14-mlp": lambda _: ImageMLPTask(validation_images(14), (100, 50, 25), 64, 1_000),
    "validation-fmnist12-deep-mlp": lambda _: ImageMLPTask(validation_images(12), (20,) * 6, 128, 1_000, "tanh"),
    "validation-letters-mlp": lambda _: TabularMLPTask(validation_letters(), (96, 48), 100, activation="gelu"),
    "validation-fmnist14-cnn": lambda _: ImageCNNTask(validation_images(14), (6, 12), "max", "flatten", batch_size=50),
    "validation-fmnist14-autoencoder": lambda _: AutoencoderTask(validation_images(14), (80, 12, 80), 100),
    "validation-fmnist12-inpainting": lambda _: InpaintingTask(validation_images(12), (64, 64, 64), 50),
    "validation-hubble-siren": lambda _: ImageFitTask(load_photograph("hubble"), (48, 48), batch_size=200),
    "validation-carroll-transformer": lambda _: ByteTransformerTask(load_text("carroll"), width=40, context=40),
    "validation-carroll-windows-mlp": lambda _: WindowMLPTask(load_text("carroll")),
    "validation-few-letters-mlp": lambda _: TabularMLPTask(validation_letters(1_600), (64, 32), 64),
    "validation-few-fmnist8-mlp": lambda _: ImageMLPTask(few_validation_images(), (64, 32), 64, 1_000),
}
"""What makes each of them, by name."""

register_tasks(META_VALIDATION_TASKS)
