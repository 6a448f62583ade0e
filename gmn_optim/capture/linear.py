"""Linear layers: the gradient of the weight is the sum over rows of ``g a^T``."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gmn_optim.capture.adapters import AbstractLayerAdapter, register_layer
from gmn_optim.weight_order import WeightOrder


@register_layer(nn.Linear)
class LinearAdapter(AbstractLayerAdapter):
    """``nn.Linear``; inputs (i), (b, i) or (b, ..., i): axes between the first and the last are positions."""

    def select_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the only argument of ``nn.Linear.forward``, positional or called ``input``."""
        return args[0] if args else kwargs["input"]

    def activations(self, module: nn.Module, layer_input: Tensor) -> Tensor:
        """Return the input as (b, p, i)."""
        return with_positions(layer_input)

    def backprops(self, module: nn.Module, output_gradient: Tensor) -> Tensor:
        """Return the gradient of the output as (b, p, o)."""
        return with_positions(output_gradient)

    def widths(self, module: nn.Module) -> tuple[int, int]:
        """Return (in_features, out_features)."""
        return module.in_features, module.out_features


@register_layer("transformers.pytorch_utils.Conv1D")
class TransposedLinearAdapter(LinearAdapter):
    """The linear layer of GPT-2 in Hugging Face transformers, called ``Conv1D``, whose weight lies as (i, o)."""

    def select_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the only argument, positional or called ``x``."""
        return args[0] if args else kwargs["x"]

    def widths(self, module: nn.Module) -> tuple[int, int]:
        """Return the sides of the weight (i, o)."""
        return tuple(module.weight.shape)

    def weight_order(self, module: nn.Module) -> WeightOrder:
        """Return that the outputs are the weight's second axis."""
        return WeightOrder(tuple(module.weight.shape), (1, 0))


def with_positions(tensor: Tensor) -> Tensor:
    """Return (n), (b, n) or (b, ..., n) as (b, p, n)."""
    if tensor.dim() == 1:
        return tensor[None, None]
    if tensor.dim() == 2:
        return tensor.unsqueeze(1)
    return tensor.flatten(1, -2)
