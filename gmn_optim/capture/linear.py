"""``nn.Linear``: the gradient of the weight is the sum over rows of ``g a^T``."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gmn_optim.capture.adapters import AbstractLayerAdapter, register_layer
from gmn_optim.gradients import DecomposedGradient


@register_layer(nn.Linear)
class LinearAdapter(AbstractLayerAdapter):
    """Inputs (i), (b, i) or (b, ..., i): axes between the first and the last are positions."""

    def select_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the only argument of ``nn.Linear.forward``, positional or called ``input``."""
        return args[0] if args else kwargs["input"]

    def activations(self, module: nn.Module, layer_input: Tensor) -> Tensor:
        """Return the input as (b, p, i)."""
        return _with_positions(layer_input)

    def backprops(self, module: nn.Module, output_gradient: Tensor) -> Tensor:
        """Return the gradient of the output as (b, p, o)."""
        return _with_positions(output_gradient)

    def recompose(self, module: nn.Module, gradient: DecomposedGradient) -> dict[str, Tensor]:
        """Return the gradients of the weight (o, i) and, if there is one, of the bias (o)."""
        recomposed = {"weight": gradient.sum_of_outer_products()}
        if getattr(module, "bias", None) is not None:
            recomposed["bias"] = gradient.sum_of_backprops()
        return recomposed

    def widths(self, module: nn.Module) -> tuple[int, int]:
        """Return (in_features, out_features)."""
        return module.in_features, module.out_features


def _with_positions(tensor: Tensor) -> Tensor:
    """Return (i), (b, i) or (b, ..., i) as (b, p, i)."""
    if tensor.dim() == 1:
        return tensor[None, None]
    if tensor.dim() == 2:
        return tensor.unsqueeze(1)
    return tensor.flatten(1, -2)
