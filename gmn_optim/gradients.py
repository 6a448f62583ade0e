"""Gradients of many data points, kept as their rank-1 factors.

Letters for axes, here and everywhere: ``b`` data point, ``p`` position (token, patch, or repeated use of a layer),
``i`` input, ``o`` output, ``n`` neuron, ``c`` channel, ``k`` task.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class DecomposedGradient(NamedTuple):
    """One layer's gradient over a set of data points as factors: the sum over b and p of ``g a^T`` is the gradient.

    Attributes:
        activations: What entered the layer (b, p, i).
        backprops: The gradient of the loss with respect to the layer's output (b, p, o). With a mean loss it
            carries the factor 1/b of the loss, so that the sum below equals ``weight.grad``.

    Reference:
        Gelberg et al. (2025), "GradMetaNet", arXiv 2507.01649, section 3.

    Example:
        >>> import torch
        >>> gradient = DecomposedGradient(torch.ones(5, 1, 3), torch.ones(5, 1, 2))
        >>> gradient.sum_of_outer_products()
        tensor([[5., 5., 5.],
                [5., 5., 5.]])
    """

    activations: Tensor
    backprops: Tensor

    def sum_of_outer_products(self, groups: int = 1) -> Tensor:
        """Return the sum over data points and positions of ``g a^T`` (o, i), or of its diagonal blocks (o, i / groups).

        Args:
            groups: Number of blocks that inputs and outputs fall into, each output seeing the inputs of its block.
        """
        activations, backprops = self.activations.flatten(0, 1), self.backprops.flatten(0, 1)
        if groups == 1:
            return backprops.mT @ activations
        blocks = (each.unflatten(1, (groups, -1)).movedim(1, 0) for each in (backprops, activations))
        return torch.bmm(next(blocks).mT, next(blocks)).flatten(0, 1)

    def sum_of_products(self) -> Tensor:
        """Return the sum over data points and positions of ``g * a`` (n), for layers that scale each neuron."""
        return (self.activations * self.backprops).sum((0, 1))

    def sum_of_backprops(self) -> Tensor:
        """Return the sum over data points and positions of ``g`` (o)."""
        return self.backprops.sum((0, 1))


Recomposition = Callable[[DecomposedGradient], dict[str, Tensor]]


class GradientSet(dict[str, DecomposedGradient]):
    """Layer name to :class:`DecomposedGradient`, with the way back to ordinary gradients.

    Args:
        factors: Layer name to its factors.
        recompositions: Layer name to the function that turns factors into gradients of that layer's parameters.

    Example:
        >>> import torch, gmn_optim
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2))
        >>> with gmn_optim.GradientCapture(model) as capture:
        ...     model(torch.randn(5, 3)).square().mean().backward()
        ...     gradients = capture.gradients()
        >>> bool(torch.allclose(gradients.mean_gradient("0")["weight"], model[0].weight.grad))
        True
        >>> gradients.per_sample_gradients("0")["weight"].shape
        torch.Size([5, 2, 3])
    """

    def __init__(
        self, factors: Mapping[str, DecomposedGradient], recompositions: Mapping[str, Recomposition] | None = None
    ) -> None:
        super().__init__(factors)
        self.recompositions = dict(recompositions or {})

    def mean_gradient(self, name: str) -> dict[str, Tensor]:
        """Return the gradients of the parameters of layer ``name``, as ``backward`` leaves them in ``.grad``."""
        return self.recompositions.get(name, _recompose_linear)(self[name])

    def per_sample_gradients(self, name: str) -> dict[str, Tensor]:
        """Return each data point's share of the gradients of layer ``name``, shapes (b, *parameter)."""
        recompose = self.recompositions.get(name, _recompose_linear)

        def of_one(activations: Tensor, backprops: Tensor) -> dict[str, Tensor]:
            return recompose(DecomposedGradient(activations[None], backprops[None]))

        return torch.func.vmap(of_one)(*self[name])


def _recompose_linear(gradient: DecomposedGradient) -> dict[str, Tensor]:
    """Recompose the way ``nn.Linear`` does."""
    return {"weight": gradient.sum_of_outer_products(), "bias": gradient.sum_of_backprops()}
