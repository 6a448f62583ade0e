"""Classifiers of rows of features by multi-layer perceptrons."""

from collections.abc import Sequence

from gmn_optim.tasks.datasets import TableData
from gmn_optim.tasks.mlp import build_mlp, dashed
from gmn_optim.tasks.supervised import Examples, SupervisedTask, Variation, split_examples, standardize


class TabularMLPTask(SupervisedTask):
    """An MLP on features that are scaled to mean 0 and variance 1 one by one, cross-entropy loss.

    Args:
        data: Features and labels.
        hidden: Widths of the hidden layers.
        batch_size: Data points of a batch.
        horizon: Steps of a full training.
        activation: ``relu``, ``tanh``, ``gelu`` or ``silu``.
        variation: Changes of scale and labels.

    Example:
        >>> from gmn_optim.tasks.datasets import load_letters
        >>> task = TabularMLPTask(load_letters(), (24, 24), activation="tanh")
        >>> task.name, task.module[-1].out_features
        ('mlp-24-24-tanh-b128', 26)
    """

    def __init__(
        self,
        data: TableData,
        hidden: Sequence[int] = (32,),
        batch_size: int = 128,
        horizon: int = 1_000,
        activation: str = "relu",
        variation: Variation | None = None,
    ) -> None:
        widths = [data.train_features.shape[1], *hidden, int(data.train_labels.max()) + 1]
        train, test = Examples(data.train_features, data.train_labels), Examples(data.test_features, data.test_labels)
        super().__init__(
            build_mlp(widths, activation),
            split_examples(train, test),
            standardize(data.train_features, by_column=True),
            batch_size=batch_size,
            horizon=horizon,
            variation=variation,
        )
        self.name = f"mlp-{dashed(hidden)}-{activation}-b{batch_size}{self.variation.suffix}"
