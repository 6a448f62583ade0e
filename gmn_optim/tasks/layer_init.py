"""The initial parameters that torch gives its layers, drawn from a generator that is passed in."""

import math

import torch
from torch import Tensor, nn

from gmn_optim.errors import InvalidArgumentError
from gmn_optim.tasks.base import Parameters

_UNIFORM = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def default_parameters(module: nn.Module, generator: torch.Generator, scale: float = 1.0) -> Parameters:
    """Return fresh parameters of a network by name, distributed as torch's own layers start.

    Weights and biases of linear layers and convolutions are uniform within 1 / sqrt(fan-in), embeddings normal,
    normalizations ones and zeros.

    Args:
        module: The network; its own parameters are left alone.
        generator: Source of randomness.
        scale: Factor on everything but normalizations.

    Raises:
        InvalidArgumentError: a layer of another kind has parameters.

    Example:
        >>> parameters = default_parameters(nn.Linear(4, 2), torch.Generator().manual_seed(0))
        >>> {name: tuple(value.shape) for name, value in parameters.items()}
        {'weight': (2, 4), 'bias': (2,)}
        >>> bool(parameters["weight"].abs().max() <= 1 / 2)
        True
    """
    return {
        f"{prefix}.{name}".lstrip("."): _draw(layer, name, parameter, generator, scale)
        for prefix, layer in module.named_modules()
        for name, parameter in layer.named_parameters(recurse=False)
    }


def _draw(layer: nn.Module, name: str, like: Tensor, generator: torch.Generator, scale: float) -> Tensor:
    """Return one parameter of a layer."""
    if isinstance(layer, _UNIFORM):
        bound = scale / math.sqrt(layer.weight[0].numel())
        return (torch.rand(like.shape, generator=generator) * 2 - 1) * bound
    if isinstance(layer, nn.Embedding):
        return torch.randn(like.shape, generator=generator) * scale
    if isinstance(layer, nn.LayerNorm):
        return torch.ones(like.shape) if name == "weight" else torch.zeros(like.shape)
    raise InvalidArgumentError(
        f"no initialization is known for the parameter {name!r} of {type(layer).__name__}; expected "
        f"{', '.join(kind.__name__ for kind in (*_UNIFORM, nn.Embedding, nn.LayerNorm))}: override init_parameters"
    )
