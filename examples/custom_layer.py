"""Teach the capture a layer kind of your own, so that the learned term serves it.

    python examples/custom_layer.py

A layer whose gradient is a sum of outer products needs an adapter of four short methods. ``assert_recomposes`` checks
it against autograd.
"""

import torch
from torch import nn

from gmn_optim import GMNOptimizer
from gmn_optim.capture import AbstractLayerAdapter, register_layer
from gmn_optim.testing import assert_recomposes


class ScaledLinear(nn.Module):
    """``y = W x / sqrt(inputs)``, as in networks with the maximal update parametrization."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return outputs (b, o) of inputs (b, i)."""
        return x @ self.weight.T / self.weight.shape[1] ** 0.5


@register_layer(ScaledLinear)
class ScaledLinearAdapter(AbstractLayerAdapter):
    """The weight multiplies the scaled input."""

    def select_input(self, module, args, kwargs):
        return args[0]

    def activations(self, module, layer_input):
        return (layer_input / module.weight.shape[1] ** 0.5).unsqueeze(1)  # (b, 1, i)

    def backprops(self, module, output_gradient):
        return output_gradient.unsqueeze(1)  # (b, 1, o)

    def widths(self, module):
        outputs, inputs = module.weight.shape
        return inputs, outputs


def main() -> None:
    """Check the adapter, train a model of such layers, and show who updates them."""
    assert_recomposes(ScaledLinear(3, 2).double(), torch.randn(5, 3, dtype=torch.float64))
    torch.manual_seed(0)
    model = nn.Sequential(ScaledLinear(8, 16), nn.Tanh(), ScaledLinear(16, 1))
    optimizer = GMNOptimizer(model)
    for _ in range(100):
        inputs = torch.randn(64, 8)
        loss = (model(inputs) - inputs[:, :1].sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(optimizer.summary(spaces=True))
    print(f"\nloss after 100 steps: {loss.item():.4f}")


if __name__ == "__main__":
    main()
