"""How weights lie in memory, for layers that keep them otherwise than outputs first."""

from typing import NamedTuple

from torch import Tensor


class WeightOrder(NamedTuple):
    """How a weight lies in memory: its axes, split to ``sizes``, stand in the order ``axes`` in the matrix (o, i).

    Example:
        >>> import torch
        >>> WeightOrder((3, 2), (1, 0)).arrange(torch.arange(6).view(3, 2)).tolist()
        [[0, 2, 4], [1, 3, 5]]
    """

    sizes: tuple[int, ...]
    axes: tuple[int, ...]

    def arrange(self, weight: Tensor) -> Tensor:
        """Return a tensor with the weight's shape in the order of the matrix; a view where the split allows one."""
        return weight.reshape(self.sizes).permute(self.axes)

    def restore(self, flat: Tensor) -> Tensor:
        """Return a flat tensor (size, ...) in the order of the matrix as a view (*sizes, ...), as in memory."""
        inverse = sorted(range(len(self.axes)), key=self.axes.__getitem__)
        behind = range(len(inverse), len(inverse) + flat.dim() - 1)
        return flat.view([self.sizes[axis] for axis in self.axes] + list(flat.shape[1:])).permute(*inverse, *behind)
