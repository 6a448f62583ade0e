"""Multi-layer perceptrons, which several tasks are made of."""

from collections.abc import Sequence

from torch import nn

from gmn_optim.errors import InvalidArgumentError
from gmn_optim.registry import unknown_name_message

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU}


def activation_class(name: str) -> type[nn.Module]:
    """Return an activation by name.

    Raises:
        InvalidArgumentError: the name is none of ``relu``, ``tanh``, ``gelu`` and ``silu``.
    """
    if name not in ACTIVATIONS:
        raise InvalidArgumentError(unknown_name_message("activation", name, list(ACTIVATIONS)))
    return ACTIVATIONS[name]


def build_mlp(widths: Sequence[int], activation: str) -> nn.Sequential:
    """Return an MLP with these widths, an activation between each two layers.

    Example:
        >>> [type(layer).__name__ for layer in build_mlp((4, 3, 2), "relu")]
        ['Linear', 'ReLU', 'Linear']
    """
    kind = activation_class(activation)
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(fan_in, fan_out), kind()]
    return nn.Sequential(*layers[:-1])


def dashed(numbers: Sequence[int]) -> str:
    """Return numbers as a name has them, such as ``64-32``."""
    return "-".join(str(number) for number in numbers)
