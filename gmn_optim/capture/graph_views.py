"""Which block of a weight is left after the views that an autograd graph shows.

The views are replayed on a stand-in of the weight that has no memory; its strides and offset then tell the block.
"""

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node


class Block(NamedTuple):
    """Some rows and columns of a weight, taken as the matrix ``weight.flatten(1)``.

    Attributes:
        rows: Which rows.
        columns: Which columns.
        size: Numbers of rows and columns of the whole matrix (o, i).

    Example:
        >>> Block(range(1, 4), range(0, 3), (4, 3)).is_whole
        False
    """

    rows: range
    columns: range
    size: tuple[int, int]

    @property
    def is_whole(self) -> bool:
        """Whether nothing of the weight is left out."""
        return (len(self.rows), len(self.columns)) == self.size


def replay_views(shape: Sequence[int], path: Iterable[tuple[Node, int]]) -> Tensor | None:
    """Return what view operations make of a stand-in without memory, or None where they cannot be replayed.

    Args:
        shape: Shape of the stand-in.
        path: Backward node of each view operation, and which of its outputs is meant.

    Example:
        >>> node = torch.ones(3, 4, requires_grad=True).T.grad_fn
        >>> replay_views((3, 4), [(node, 0)]).stride()
        (1, 4)
    """
    view = torch.empty(shape, device="meta")
    try:
        for node, output in path:
            view = VIEWS[node.name()](view, node)[output]
    except RuntimeError:  # a view of a copy may join axes that are apart in the stand-in
        return None
    return view


def find_block(shape: Sequence[int], view: Tensor) -> tuple[Block, bool] | None:
    """Return which block of a weight, taken as a matrix (o, i), a view is.

    Args:
        shape: Shape of the weight; axes behind the first are one.
        view: The stand-in after all views; only its last two axes may hold different elements.

    Returns:
        The block, and whether the view is its transpose; None if the view is no block.

    Example:
        >>> find_block((4, 3), torch.empty(4, 3, device="meta")[1:].T)
        (Block(rows=range(1, 4), columns=range(0, 3), size=(4, 3)), True)
    """
    if len(shape) < 2 or view.dim() < 2 or not view.numel() or not _is_repeated(view):
        return None
    width = prod(shape[1:])
    starts = divmod(view.storage_offset(), width)
    for matrix in (view, view.mT):
        sizes, strides = matrix.shape[-2:], matrix.stride()[-2:]
        rows, columns = (range(start, start + size) for start, size in zip(starts, sizes, strict=True))
        # An axis of size 1 may have any stride; such a view can be read both ways, of which one leaves the weight.
        is_block = all(
            size == 1 or stride == step for size, stride, step in zip(sizes, strides, (width, 1), strict=True)
        )
        if is_block and columns.stop <= width:
            return Block(rows, columns, (shape[0], width)), matrix is not view
    return None


def _is_repeated(view: Tensor) -> bool:
    """Whether axes before the last two only repeat the matrix."""
    return all(size == 1 or stride == 0 for size, stride in zip(view.shape[:-2], view.stride()[:-2], strict=True))


def _signed(number: int) -> int:
    """Undo that nodes show negative axes and places as unsigned."""
    return number - 2**64 if number >= 2**63 else number


def _reshape(view: Tensor, node: Node) -> Sequence[Tensor]:
    """Give the stand-in the shape of the node's output."""
    return (view.view(tuple(node._input_metadata[0].shape)),)


def _slice(view: Tensor, node: Node) -> Sequence[Tensor]:
    """Cut the stand-in along one axis."""
    places = [slice(None)] * view.dim()
    places[_signed(node._saved_dim)] = slice(
        _signed(node._saved_start), _signed(node._saved_end), _signed(node._saved_step)
    )
    return (view[tuple(places)],)


_Replay = Callable[[Tensor, Node], Sequence[Tensor]]

VIEWS: dict[str, _Replay] = {
    "TBackward0": lambda view, node: (view.t(),),
    "TransposeBackward0": lambda view, node: (view.transpose(_signed(node._saved_dim0), _signed(node._saved_dim1)),),
    "PermuteBackward0": lambda view, node: (view.permute([_signed(axis) for axis in node._saved_dims]),),
    "ExpandBackward0": lambda view, node: (view.expand(tuple(node._input_metadata[0].shape)),),
    "SliceBackward0": _slice,
    "SelectBackward0": lambda view, node: (view.select(_signed(node._saved_dim), _signed(node._saved_index)),),
    "UnbindBackward0": lambda view, node: view.unbind(_signed(node._saved_dim)),
    "SplitBackward0": lambda view, node: view.split(node._saved_split_size, _signed(node._saved_dim)),
    "UnsafeSplitBackward0": lambda view, node: view.split(node._saved_split_size, _signed(node._saved_dim)),
    "SplitWithSizesBackward0": lambda view, node: view.split(list(node._saved_split_sizes), _signed(node._saved_dim)),
    **dict.fromkeys(("AliasBackward0", "CloneBackward0", "ToCopyBackward0"), lambda view, node: (view,)),
    **dict.fromkeys(("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "UnsqueezeBackward0"), _reshape),
    **dict.fromkeys((f"SqueezeBackward{number}" for number in range(6)), _reshape),
}
"""Name of the backward node of a view operation, to what it makes of a stand-in: one tensor for each output."""
