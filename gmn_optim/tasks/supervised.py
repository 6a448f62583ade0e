"""Tasks that fit a network to pairs of an input and a target."""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gmn_optim.tasks.base import AbstractTask, Batch, Parameters, Split
from gmn_optim.tasks.layer_init import default_parameters

CLASSIFIER_FLOOR = 0.02
"""Of the logarithm of the number of classes: the loss floor of classifiers."""

REGRESSION_FLOOR = 1e-3
"""Of the target's variance: the loss floor of regressions."""

VALIDATION_EXAMPLES = 5_000
"""The last training examples, at most so many and an eighth, which no inner training sees: choices are made on them."""


class Examples(NamedTuple):
    """Inputs and targets, as they are stored.

    Attributes:
        inputs: (n, ...).
        targets: Classes (n,) int64, or values (n, ...) of another type.

    Example:
        >>> Examples(torch.zeros(2, 3), torch.tensor([0, 1])).targets.tolist()
        [0, 1]
    """

    inputs: Tensor
    targets: Tensor


class SplitExamples(NamedTuple):
    """Examples for training, for choices, and for the final figures.

    Attributes:
        train: What batches are drawn from.
        validation: Held out.
        test: Held out.

    Example:
        >>> rows = Examples(torch.arange(16.0), torch.arange(16))
        >>> [len(part.inputs) for part in split_examples(rows, rows)]
        [14, 2, 16]
    """

    train: Examples
    validation: Examples
    test: Examples


class Scaling(NamedTuple):
    """Stored values to those that a network sees: ``(values - mean) / std``.

    Attributes:
        mean: () or one for each column.
        std: Likewise.

    Example:
        >>> Scaling(torch.tensor(1.0), torch.tensor(2.0)).apply(torch.tensor([1, 5])).tolist()
        [0.0, 2.0]
    """

    mean: Tensor
    std: Tensor

    def apply(self, values: Tensor) -> Tensor:
        """Return the values in float32, shifted and scaled."""
        return (values.float() - self.mean) / self.std


class Variation(NamedTuple):
    """What may be changed about a task to make another one of it.

    Attributes:
        parameter_scale: Factor on the initial parameters.
        input_scale: Factor on what the network sees.
        label_noise: Share of training examples whose class is drawn anew, once and for all.

    Example:
        >>> Variation(input_scale=0.5).suffix
        '-x0.50'
    """

    parameter_scale: float = 1.0
    input_scale: float = 1.0
    label_noise: float = 0.0

    @property
    def suffix(self) -> str:
        """What a name says of it: nothing of what is as usual."""
        parts = (("w", self.parameter_scale, 1.0), ("x", self.input_scale, 1.0), ("n", self.label_noise, 0.0))
        return "".join(f"-{letter}{value:.2f}" for letter, value, usual in parts if value != usual)

    @property
    def limit_factor(self) -> float:
        """How much larger losses may be: larger parameters and inputs begin at larger outputs."""
        return max(1.0, self.parameter_scale * self.input_scale) ** 2


class SupervisedTask(AbstractTask):
    """A network on examples: cross-entropy if targets are whole numbers after scaling, mean squared error otherwise.

    Args:
        module: The network, from inputs (b, ...) to logits (b, classes) or values like the targets.
        data: Examples as stored.
        input_scaling: From stored inputs to what the network sees; None if they are that.
        target_scaling: Likewise for targets.
        batch_size: Data points of a batch.
        horizon: Steps of a full training.
        variation: Changes of scale and labels.

    Attributes:
        data: The examples as stored, labels with their noise.

    Example:
        >>> rows = Examples(torch.randn(64, 3), torch.arange(64) % 2)
        >>> task = SupervisedTask(nn.Linear(3, 2), split_examples(rows, rows), batch_size=4)
        >>> [tuple(part.shape) for part in task.sample_batch(torch.Generator(), (5,))]
        [(5, 4, 3), (5, 4)]
    """

    def __init__(
        self,
        module: nn.Module,
        data: SplitExamples,
        input_scaling: Scaling | None = None,
        target_scaling: Scaling | None = None,
        batch_size: int = 128,
        horizon: int = 1_000,
        variation: Variation | None = None,
    ) -> None:
        self.module = module
        self.batch_size = batch_size
        self.horizon = horizon
        self.variation = variation or Variation()
        self._scalings = (input_scaling, target_scaling)
        self.data = data
        self.is_classifier = data.train.targets.dtype == torch.int64
        if self.is_classifier:
            self._set_up_classes(int(data.train.targets.max()) + 1)
        else:
            self.loss_limit = 3.0 * self.variation.limit_factor
            self.loss_floor = REGRESSION_FLOOR

    def init_parameters(self, generator: torch.Generator) -> Parameters:
        """Return parameters drawn as torch's layers do."""
        return default_parameters(self.module, generator, self.variation.parameter_scale)

    def sample_batch(self, generator: torch.Generator, shape: tuple[int, ...] = ()) -> Batch:
        """Return inputs (*shape, b, ...) and targets (*shape, b, ...), drawn with replacement."""
        inputs, targets = self.data.train
        chosen = torch.randint(len(inputs), (*shape, self.batch_size), generator=generator)
        return self.prepare(Examples(inputs[chosen], targets[chosen]))

    def loss(self, parameters: Parameters, batch: Batch) -> Tensor:
        """Return the mean loss ()."""
        inputs, targets = batch
        outputs = torch.func.functional_call(self.module, parameters, (inputs,))
        if self.is_classifier:
            return nn.functional.cross_entropy(outputs, targets)
        return (outputs - targets).square().mean()

    def held_out(self, split: Split) -> Batch:
        """Return all validation or test examples."""
        return self.prepare(getattr(self.data, split))

    def prepare(self, examples: Examples) -> Batch:
        """Return stored examples as the network and the loss take them."""
        inputs, targets = (
            values if scaling is None else scaling.apply(values)
            for values, scaling in zip(examples, self._scalings, strict=True)
        )
        factor = self.variation.input_scale
        return inputs if factor == 1.0 else inputs * factor, targets

    def _set_up_classes(self, classes: int) -> None:
        """Set the levels of the loss of a classifier, and its noisy labels."""
        self.loss_limit = 1.3 * math.log(classes) * self.variation.limit_factor
        self.loss_floor = CLASSIFIER_FLOOR * math.log(classes)
        if self.variation.label_noise:
            inputs, labels = self.data.train
            noisy = redraw_labels(labels, classes, self.variation.label_noise)
            self.data = self.data._replace(train=Examples(inputs, noisy))


def split_examples(train: Examples, test: Examples) -> SplitExamples:
    """Return the examples with the last of the training ones held out for validation.

    Example:
        >>> rows = Examples(torch.arange(16.0), torch.arange(16))
        >>> split_examples(rows, rows).validation.targets.tolist()
        [14, 15]
    """
    held = min(VALIDATION_EXAMPLES, len(train.inputs) // 8)
    kept, last = (Examples(*(part[where] for part in train)) for where in (slice(-held), slice(-held, None)))
    return SplitExamples(kept, last, test)


def redraw_labels(labels: Tensor, classes: int, share: float) -> Tensor:
    """Return labels (n), the same share of them drawn anew at every call.

    Example:
        >>> labels = torch.zeros(1000, dtype=torch.int64)
        >>> 30 < int((redraw_labels(labels, 2, 0.1) != 0).sum()) < 70
        True
    """
    generator = torch.Generator().manual_seed(0)
    anew = torch.rand(labels.shape, generator=generator) < share
    return torch.where(anew, torch.randint(classes, labels.shape, generator=generator), labels)


@functools.lru_cache(maxsize=64)
def standardize(values: Tensor, by_column: bool = False) -> Scaling:
    """Return the scaling of rows (n, d) to mean 0 and variance 1, together or column by column.

    Example:
        >>> standardize(torch.tensor([[0], [2]], dtype=torch.uint8)).mean.item()
        1.0
    """
    std, mean = torch.std_mean(values.float(), 0) if by_column else torch.std_mean(values.float())
    return Scaling(mean, std.clamp_min(1e-6))
