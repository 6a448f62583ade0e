"""Classifiers of images by multi-layer perceptrons, among them the paper's on Fashion-MNIST at 8x8."""

from collections.abc import Sequence

from gmn_optim.tasks.base import tasks
from gmn_optim.tasks.datasets import ImageData, load_fashion_mnist_8x8
from gmn_optim.tasks.mlp import build_mlp, dashed
from gmn_optim.tasks.supervised import Examples, SplitExamples, SupervisedTask, Variation, split_examples, standardize


class ImageMLPTask(SupervisedTask):
    """An MLP on flattened images, cross-entropy loss.

    Args:
        data: Images and labels; pixels are shifted and scaled to mean 0 and variance 1 over the training images.
        hidden: Widths of the hidden layers.
        batch_size: Data points of a batch.
        horizon: Steps of a full training.
        activation: ``relu``, ``tanh``, ``gelu`` or ``silu``.
        variation: Changes of scale and labels.

    Example:
        >>> import torch
        >>> task = ImageMLPTask(load_fashion_mnist_8x8(), batch_size=4)
        >>> generator = torch.Generator().manual_seed(0)
        >>> [tuple(part.shape) for part in task.sample_batch(generator, (3,))]
        [(3, 4, 64), (3, 4)]
        >>> task.name
        'mlp-32-relu-b4'
    """

    def __init__(
        self,
        data: ImageData,
        hidden: Sequence[int] = (32,),
        batch_size: int = 128,
        horizon: int = 2_000,
        activation: str = "relu",
        variation: Variation | None = None,
    ) -> None:
        widths = [data.train_images.shape[1], *hidden, int(data.train_labels.max()) + 1]
        super().__init__(
            build_mlp(widths, activation),
            labelled_images(data),
            standardize(data.train_images),
            batch_size=batch_size,
            horizon=horizon,
            variation=variation,
        )
        self.name = f"mlp-{dashed(hidden)}-{activation}-b{batch_size}{self.variation.suffix}"


def labelled_images(data: ImageData) -> SplitExamples:
    """Return images and their labels, the last training ones held out.

    Example:
        >>> [len(part.inputs) for part in labelled_images(load_fashion_mnist_8x8())]
        [55000, 5000, 10000]
    """
    return split_examples(Examples(data.train_images, data.train_labels), Examples(data.test_images, data.test_labels))


@tasks.register("fashion-mnist-mlp")
class FashionMNISTTask(ImageMLPTask):
    """The paper's Fashion-MNIST task: 8x8 images, one hidden layer of 32, ReLU, batch 128, 2,000 steps."""

    def __init__(self) -> None:
        super().__init__(load_fashion_mnist_8x8())
        self.name = "fashion-mnist-mlp"
