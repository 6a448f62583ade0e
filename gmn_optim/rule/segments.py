"""One parameter's place in the tensors that the update rule works on."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from gmn_optim.weight_order import WeightOrder

ROLES = ("weight", "table", "scale", "bias", "other")
"""Roles of a parameter in its layer, in the order in which they stand in a chunk."""


@dataclass(frozen=True)
class Segment:
    """One parameter's place in a chunk.

    Attributes:
        name: Full name of the parameter.
        shape: Its shape.
        layer: Name of the captured layer that it belongs to, or None.
        role: What it is in that layer, one of :data:`ROLES`; ``other`` if there is none.
        order: How it lies in memory, if otherwise than outputs first.
        groups: Blocks that the layer's inputs and outputs fall into.
        missed: Whether the layer's factors were found not to explain its gradient.

    Example:
        >>> import torch
        >>> Segment("w", (3, 2), order=WeightOrder((3, 2), (1, 0))).flatten(torch.arange(6).view(3, 2)).tolist()
        [0, 2, 4, 1, 3, 5]
    """

    name: str
    shape: tuple[int, ...]
    layer: str | None = None
    role: str = "other"
    order: WeightOrder | None = None
    groups: int = 1
    missed: bool = False

    def flatten(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the parameter's shape as a flat one, outputs first."""
        return (tensor if self.order is None else self.order.arrange(tensor)).reshape(-1)

    def unflatten(self, flat: Tensor) -> Tensor:
        """Return a flat tensor (size, ...) as a view with the parameter's shape, or with its sizes in memory."""
        if self.order is None:
            return flat.view(self.shape + flat.shape[1:])
        return self.order.restore(flat)

    @cached_property
    def size(self) -> int:
        """Return the number of elements."""
        size = 1
        for side in self.shape:
            size *= side
        return size

    @property
    def sides(self) -> tuple[int, int]:
        """Return the rows and columns (o, i / groups) of the matrix that a weight is, outputs first."""
        if self.order is None:
            return self.shape[0], self.size // max(1, self.shape[0])
        columns = self.order.sizes[self.order.axes[-1]]
        return self.size // max(1, columns), columns
