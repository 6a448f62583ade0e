"""Fits of one picture by a network from coordinates to colours (implicit neural representations)."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gmn_optim.errors import InvalidArgumentError
from gmn_optim.tasks.base import Parameters
from gmn_optim.tasks.mlp import build_mlp, dashed
from gmn_optim.tasks.supervised import Examples, SplitExamples, SupervisedTask, Variation, standardize


class Sine(nn.Module):
    """``sin(frequency * x)``.

    Example:
        >>> round(Sine(2.0)(torch.tensor(math.pi / 4)).item(), 4)
        1.0
    """

    def __init__(self, frequency: float) -> None:
        super().__init__()
        self.frequency = frequency

    def forward(self, x: Tensor) -> Tensor:
        """Return values like the inputs."""
        return torch.sin(self.frequency * x)


class ImageFitTask(SupervisedTask):
    """A network from the place of a pixel to its colour, mean squared error; a batch is a random set of pixels.

    Of the pixels nine tenths are for training; the others show how well the network interpolates.

    Args:
        picture: Levels from 0 to 255 (h, w, channels) uint8, scaled to mean 0 and variance 1.
        hidden: Widths of the hidden layers.
        encoding: ``siren`` (sines as activations, with the initialization that belongs to them) or ``fourier``
            (random sines and cosines of the place, then ReLU).
        frequency: Of a SIREN's sines; or the standard deviation of the Fourier features' frequencies.
        features: Number of Fourier features.
        batch_size: Pixels of a batch.
        horizon: Steps of a full training.

    Raises:
        InvalidArgumentError: the encoding is another one.

    Reference:
        Sitzmann et al. (2020), "Implicit Neural Representations with Periodic Activation Functions", arXiv 2006.09661;
        Tancik et al. (2020), "Fourier Features Let Networks Learn High Frequency Functions", arXiv 2006.10739.

    Example:
        >>> from gmn_optim.tasks.datasets import load_photograph
        >>> task = ImageFitTask(load_photograph("coffee"), (16, 16), batch_size=8)
        >>> [tuple(part.shape) for part in task.sample_batch(torch.Generator(), (5,))]
        [(5, 8, 2), (5, 8, 3)]
    """

    def __init__(
        self,
        picture: Tensor,
        hidden: Sequence[int] = (32, 32),
        encoding: str = "siren",
        frequency: float | None = None,
        features: int = 32,
        batch_size: int = 128,
        horizon: int = 1_000,
    ) -> None:
        if encoding not in ("siren", "fourier"):
            raise InvalidArgumentError(f"encoding is {encoding!r}; expected 'siren' or 'fourier'")
        self.encoding = encoding
        self.frequency = frequency if frequency is not None else {"siren": 30.0, "fourier": 4.0}[encoding]
        places = pixel_places(picture.shape[0], picture.shape[1])
        inputs = places if encoding == "siren" else fourier_features(places, features, self.frequency)
        colours = picture.flatten(0, 1)
        widths = [inputs.shape[1], *hidden, picture.shape[2]]
        module = build_siren(widths, self.frequency) if encoding == "siren" else build_mlp(widths, "relu")
        examples = all_pixels(inputs, colours)
        super().__init__(
            module, examples, None, standardize(picture), batch_size=batch_size, horizon=horizon, variation=Variation()
        )
        self.name = f"{encoding}-{dashed(hidden)}-b{batch_size}"

    def init_parameters(self, generator: torch.Generator) -> Parameters:
        """Return fresh parameters: of the Fourier features' network as torch draws them, of a SIREN as its paper."""
        parameters = super().init_parameters(generator)
        if self.encoding == "siren":
            for name, value in parameters.items():
                if name.endswith("weight"):
                    parameters[name] = value * siren_gain(value.shape[1], self.frequency, first=name == "0.weight")
        return parameters


def siren_gain(fan_in: int, frequency: float, first: bool) -> float:
    """Return how much wider a SIREN's weights are spread than torch's linear layers, 1 / sqrt(fan-in).

    Example:
        >>> round(siren_gain(4, 30.0, first=True), 4), round(siren_gain(4, 30.0, first=False), 4)
        (0.5, 0.0816)
    """
    return 1 / math.sqrt(fan_in) if first else math.sqrt(6) / frequency


def build_siren(widths: Sequence[int], frequency: float) -> nn.Sequential:
    """Return an MLP with sines between its layers.

    Example:
        >>> [type(layer).__name__ for layer in build_siren((2, 8, 3), 30.0)]
        ['Linear', 'Sine', 'Linear']
    """
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(fan_in, fan_out), Sine(frequency)]
    return nn.Sequential(*layers[:-1])


@functools.lru_cache(maxsize=8)
def pixel_places(height: int, width: int) -> Tensor:
    """Return the places of pixels, row by row, from -1 to 1 (height * width, 2).

    Example:
        >>> pixel_places(1, 2).tolist()
        [[0.0, -0.5], [0.0, 0.5]]
    """
    rows, columns = ((2 * torch.arange(size) + 1) / size - 1 for size in (height, width))
    return torch.cartesian_prod(rows, columns)


def fourier_features(places: Tensor, features: int, deviation: float) -> Tensor:
    """Return sines and cosines of random projections of places (n, 2), the same at every call (n, features).

    Example:
        >>> fourier_features(pixel_places(2, 2), 6, 4.0).shape
        torch.Size([4, 6])
    """
    directions = torch.randn(2, features // 2, generator=torch.Generator().manual_seed(0)) * deviation
    angles = math.pi * places @ directions
    return torch.cat([angles.sin(), angles.cos()], 1)


def all_pixels(inputs: Tensor, colours: Tensor) -> SplitExamples:
    """Return every pixel for each part: what counts is the picture that the network holds, not what it has not seen.

    Example:
        >>> [len(part.inputs) for part in all_pixels(torch.zeros(100, 2), torch.zeros(100, 3))]
        [100, 100, 100]
    """
    return SplitExamples(*[Examples(inputs, colours)] * 3)
