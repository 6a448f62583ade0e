"""The mixture of tasks for meta-training, made from the data of the package alone."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from gmn_optim.tasks.base import AbstractTask
from gmn_optim.tasks.byte_transformer import ByteTransformerTask
from gmn_optim.tasks.datasets import (
    ImageData,
    Labelled,
    TableData,
    load_fashion_mnist_8x8,
    load_fashion_mnist_14x14,
    load_letters,
    load_photograph,
    load_text,
    subset,
)
from gmn_optim.tasks.family import AbstractTaskFamily, families
from gmn_optim.tasks.image_cnn import ImageCNNTask
from gmn_optim.tasks.image_fit import ImageFitTask
from gmn_optim.tasks.image_mlp import ImageMLPTask
from gmn_optim.tasks.image_regression import AutoencoderTask, InpaintingTask
from gmn_optim.tasks.meta_test_tasks import META_TEST_TASKS
from gmn_optim.tasks.meta_validation_tasks import META_VALIDATION_TASKS
from gmn_optim.tasks.mlp import ACTIVATIONS
from gmn_optim.tasks.resizing import resize_images
from gmn_optim.tasks.supervised import Variation
from gmn_optim.tasks.tabular_mlp import TabularMLPTask

Option = TypeVar("Option")

PARAMETER_LIMIT = 30_000
"""Most parameters of a task that is drawn, so that 16 trainings side by side stay quick."""

TRANSFORMER_WORK = 10_000
"""Most features of a batch in all blocks of a transformer; a larger batch is halved."""

IMAGES = 20_000
"""The first images of Fashion-MNIST that tasks are drawn from; the next ten thousand are for validation tasks."""

LETTERS = 10_000
"""The first rows of the letters, likewise."""

FEWEST = 1_000
"""A quarter of the classifiers and regressions see so many examples, or up to 5,000, which they can learn by heart."""


class Draw:
    """Random choices from one generator.

    Example:
        >>> draw = Draw(torch.Generator().manual_seed(0))
        >>> draw.choice(["a", "b"]) in ("a", "b"), 8 <= draw.log_integer(8, 256) <= 256
        (True, True)
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Return a number between two others."""
        return low + (high - low) * torch.rand((), generator=self.generator, dtype=torch.float64).item()

    def choice(self, options: Sequence[Option]) -> Option:
        """Return one of the options."""
        return options[int(torch.randint(len(options), (), generator=self.generator))]

    def log_uniform(self, low: float, high: float) -> float:
        """Return a number whose logarithm is uniform."""
        return math.exp(self.uniform(math.log(low), math.log(high)))

    def log_integer(self, low: int, high: int) -> int:
        """Return a whole number whose logarithm is about uniform."""
        return round(self.log_uniform(low, high))

    def power_of_two(self, low: int, high: int) -> int:
        """Return a power of two between two others, all equally likely."""
        return 2 ** int(torch.randint(low.bit_length() - 1, high.bit_length(), (), generator=self.generator))

    def widths(self, layers: int, low: int, high: int) -> tuple[int, ...]:
        """Return widths of hidden layers: half the time all the same."""
        if self.uniform() < 0.5:
            return (self.log_integer(low, high),) * layers
        return tuple(self.log_integer(low, high) for _ in range(layers))

    def some(self, data: Labelled) -> Labelled:
        """Return all examples, or few of them for a quarter of tasks."""
        if self.uniform() < 0.75:
            return data
        number = self.log_integer(FEWEST, 5 * FEWEST)
        start = round(self.uniform(0, len(data.train_labels) - number))
        return subset(data, start, start + number)

    def variation(self, labels: bool) -> Variation:
        """Return scales of parameters and inputs for a third of tasks each, and noise for a fifth of classifiers."""
        parameter_scale = self.log_uniform(0.5, 2.0) if self.uniform() < 1 / 3 else 1.0
        input_scale = self.log_uniform(0.5, 2.0) if self.uniform() < 1 / 3 else 1.0
        noise = self.uniform(0.0, 0.2) if labels and self.uniform() < 0.2 else 0.0
        return Variation(parameter_scale, input_scale, noise)


@families.register("default")
class DefaultFamily(AbstractTaskFamily):
    """Classifiers, regressions, fits of pictures and models of text, all small and on real data that ship.

    A sampled task's name says what it is, such as ``fmnist14-mlp-64-32-relu-b64``; one with few examples has their
    number behind the data (``fmnist14x1200``), one that was changed its factors on parameters (``w``) and inputs
    (``x``) and its label noise (``n``) at the end.

    Example:
        >>> family = families["default"]()
        >>> task = family.sample(torch.Generator().manual_seed(0))
        >>> task.name == family.sample(torch.Generator().manual_seed(0)).name
        True
    """

    validation = tuple(META_VALIDATION_TASKS)
    test = tuple(META_TEST_TASKS)

    def sample(self, generator: torch.Generator) -> AbstractTask:
        """Return a task of at most :data:`PARAMETER_LIMIT` parameters."""
        draw = Draw(generator)
        kind = _KINDS[int(torch.multinomial(_WEIGHTS, 1, generator=generator))]
        # torch's layers draw their placeholders from the global source, which is put back afterwards
        with torch.random.fork_rng(devices=[]):
            task = kind(draw)
            while sum(parameter.numel() for parameter in task.module.parameters()) > PARAMETER_LIMIT:
                task = kind(draw)
        return task


@functools.lru_cache(maxsize=8)
def family_images(side: int) -> ImageData:
    """Return the images that tasks are drawn from, 7, 8, 10 or 14 pixels a side.

    Example:
        >>> family_images(7).train_images.shape
        torch.Size([17500, 49])
    """
    if side == 8:
        return subset(load_fashion_mnist_8x8(), 0, IMAGES)
    data = subset(load_fashion_mnist_14x14(), 0, IMAGES)
    return data if side == 14 else resize_images(data, side)


@functools.lru_cache(maxsize=1)
def family_letters() -> TableData:
    """Return the rows that tasks are drawn from.

    Example:
        >>> family_letters().train_features.shape
        torch.Size([8750, 16])
    """
    return subset(load_letters(), 0, LETTERS)


def _image_mlp(draw: Draw) -> AbstractTask:
    """Return a classifier of images."""
    side = draw.choice([7, 8, 10, 14])
    hidden = draw.widths(draw.choice([1, 2, 3, 4]), 8, 256)
    data = draw.some(family_images(side))
    task = ImageMLPTask(
        data,
        hidden,
        batch_size=draw.power_of_two(16, 256),
        horizon=1_000,
        activation=draw.choice(list(ACTIVATIONS)),
        variation=draw.variation(labels=True),
    )
    return _prefixed(_named(f"fmnist{side}", data), task)


def _letter_mlp(draw: Draw) -> AbstractTask:
    """Return a classifier of letters."""
    data = draw.some(family_letters())
    task = TabularMLPTask(
        data,
        draw.widths(draw.choice([1, 2, 3]), 8, 128),
        batch_size=draw.power_of_two(16, 256),
        activation=draw.choice(list(ACTIVATIONS)),
        variation=draw.variation(labels=True),
    )
    return _prefixed(_named("letters", data), task)


def _inpainting(draw: Draw) -> AbstractTask:
    """Return a regression of halves of images."""
    side = draw.choice([8, 10, 14])
    data = draw.some(family_images(side))
    task = InpaintingTask(
        data,
        draw.widths(draw.choice([1, 2]), 16, 128),
        batch_size=draw.power_of_two(16, 256),
        activation=draw.choice(list(ACTIVATIONS)),
        variation=draw.variation(labels=False),
    )
    return _prefixed(_named(f"fmnist{side}", data), task)


def _autoencoder(draw: Draw) -> AbstractTask:
    """Return an autoencoder of images, its outer layers as wide as each other."""
    side = draw.choice([7, 8, 10, 14])
    outer, bottleneck = draw.log_integer(16, 128), draw.log_integer(4, 24)
    task = AutoencoderTask(
        family_images(side),
        draw.choice([(bottleneck,), (outer, bottleneck, outer)]),
        batch_size=draw.power_of_two(16, 256),
        activation=draw.choice(list(ACTIVATIONS)),
        variation=draw.variation(labels=False),
    )
    return _prefixed(f"fmnist{side}", task)


def _image_fit(draw: Draw) -> AbstractTask:
    """Return a fit of a picture."""
    picture = draw.choice(["coffee", "chelsea", "rocket"])
    encoding = draw.choice(["siren", "fourier"])
    task = ImageFitTask(
        load_photograph(picture),
        draw.widths(draw.choice([1, 2, 3]), 16, 96),
        encoding,
        frequency=draw.log_uniform(10.0, 40.0) if encoding == "siren" else draw.log_uniform(2.0, 8.0),
        features=2 * draw.log_integer(8, 32),
        batch_size=draw.power_of_two(32, 256),
    )
    return _prefixed(picture, task)


def _image_cnn(draw: Draw) -> AbstractTask:
    """Return a convolutional classifier of images."""
    side = draw.choice([8, 14])
    task = ImageCNNTask(
        family_images(side),
        draw.widths(draw.choice([2, 3]), 4, 16),
        draw.choice(["stride", "average", "max"]),
        draw.choice(["mean", "flatten"]),
        batch_size=draw.power_of_two(16, 32),
        activation=draw.choice(list(ACTIVATIONS)),
        variation=draw.variation(labels=True),
    )
    return _prefixed(f"fmnist{side}", task)


def _byte_transformer(draw: Draw) -> AbstractTask:
    """Return a model of text."""
    width, blocks, context = draw.choice([16, 24, 32, 48]), draw.choice([1, 2]), draw.choice([16, 24, 32])
    batch_size = draw.power_of_two(8, 32)
    while batch_size * context * width * blocks > TRANSFORMER_WORK:
        batch_size //= 2
    task = ByteTransformerTask(
        load_text("austen"),
        width=width,
        heads=draw.choice([1, 2, 4]),
        blocks=blocks,
        context=context,
        batch_size=batch_size,
        variation=Variation(draw.variation(labels=False).parameter_scale),
    )
    return _prefixed("austen", task)


def _named(name: str, data: Labelled) -> str:
    """Return the name of data, with the number of training examples if they are few."""
    number = len(data.train_labels)
    return f"{name}x{number}" if number <= 5 * FEWEST else name


def _prefixed(data: str, task: AbstractTask) -> AbstractTask:
    """Return a task whose name begins with its data."""
    task.name = f"{data}-{task.name}"
    return task


_SHARES: dict[Callable[[Draw], AbstractTask], float] = {
    _image_mlp: 0.35,
    _letter_mlp: 0.08,
    _inpainting: 0.13,
    _autoencoder: 0.12,
    _image_fit: 0.10,
    _image_cnn: 0.10,
    _byte_transformer: 0.12,
}
_KINDS = list(_SHARES)
_WEIGHTS = torch.tensor(list(_SHARES.values()))
