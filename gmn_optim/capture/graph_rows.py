"""What a product found by ``graph`` leaves in a backward pass: rows of activations and backprops, and their order."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import CheckpointError
from torch.utils.hooks import RemovableHandle

from gmn_optim.capture.graph import OPERANDS, MatrixUse
from gmn_optim.capture.graph_views import Block
from gmn_optim.capture.watching import is_batched, is_transformed
from gmn_optim.gradients import DecomposedGradient


class Rows(NamedTuple):
    """What one product leaves: the sum over rows of ``g a^T`` is its share of the gradient of the weight's block.

    Attributes:
        activations: One factor for each row, as wide as the block (R, i).
        backprops: The other, as high as the block (R, o). In a reversed use (``x @ weight``) this is what entered,
            and ``activations`` is the gradient of what left.

    Example:
        >>> Rows(torch.ones(5, 3), torch.ones(5, 2)).backprops.shape
        torch.Size([5, 2])
    """

    activations: Tensor
    backprops: Tensor


def hook_rows(use: MatrixUse, receive: Callable[[Rows | None], None]) -> RemovableHandle:
    """Call ``receive`` whenever a backward pass has computed the weight's gradient for this use.

    It gets None where the rows are lost: sparse data have none, and non-reentrant checkpointing hands out a tensor
    once, to autograd itself. The hook lives with the graph and holds only ``receive``, no weight and no node.

    Args:
        use: From :func:`~gmn_optim.capture.graph.find_matrix_uses`.
        receive: What to call; should hold weakly what must not live as long as the graph.

    Returns:
        A handle that removes the hook.

    Example:
        >>> from gmn_optim.capture.graph import find_matrix_uses
        >>> weight, found = nn.Parameter(torch.ones(2, 3)), []
        >>> output = torch.ones(5, 3) @ weight.T
        >>> handle = hook_rows(find_matrix_uses([output], [weight]).products[0], found.append)
        >>> output.sum().backward()
        >>> bool((found[0].backprops.T @ found[0].activations == weight.grad).all())
        True
    """
    return use.node.register_hook(_RowHook(use, receive))


def fold_rows(rows: Rows, data_points: int, points_lead: bool = True) -> DecomposedGradient:
    """Return rows (R, ·) as factors (b, p, ·).

    Where R is no multiple of the number of data points, every row becomes a data point.

    Args:
        rows: Activations (R, i) and backprops (R, o).
        data_points: Number of data points b.
        points_lead: Whether rows of one data point follow each other; else rows of one position do, as in
            ``nn.MultiheadAttention``, whatever its ``batch_first``.

    Example:
        >>> rows = Rows(torch.arange(6.0).unsqueeze(1), torch.ones(6, 1))
        >>> fold_rows(rows, 2).activations.squeeze(-1).tolist()
        [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
        >>> fold_rows(rows, 2, points_lead=False).activations.squeeze(-1).tolist()
        [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]
    """
    count = rows.activations.shape[0]
    if data_points < 1 or count % data_points:
        data_points, points_lead = count, True
    positions = count // max(1, data_points)
    if points_lead:
        return DecomposedGradient(*(part.unflatten(0, (data_points, positions)) for part in rows))
    return DecomposedGradient(*(part.unflatten(0, (positions, data_points)).transpose(0, 1) for part in rows))


def widen_block(factors: DecomposedGradient, block: Block) -> DecomposedGradient:
    """Return factors of a whole weight from those of one block, with zeros outside.

    The sum over all uses of a weight is its gradient then: the three in-projections of attention share one weight.

    Args:
        factors: Activations (b, p, columns) and backprops (b, p, rows) of the block.
        block: Says which.

    Example:
        >>> factors = DecomposedGradient(torch.ones(5, 1, 3), torch.ones(5, 1, 2))
        >>> widen_block(factors, Block(range(1, 3), range(3), (4, 3))).backprops[0, 0]
        tensor([0., 1., 1., 0.])
    """
    height, width = block.size
    return DecomposedGradient(
        _place(factors.activations, block.columns, width), _place(factors.backprops, block.rows, height)
    )


def count_data_points(use: MatrixUse) -> int:
    """Return the number of data points of a use by the shape of its data, taking the first axis for data points.

    Example:
        >>> from gmn_optim.capture.graph import find_matrix_uses
        >>> weight = nn.Parameter(torch.ones(4, 3))
        >>> count_data_points(find_matrix_uses([torch.ones(5, 2, 3) @ weight.T], [weight]).products[0])
        5
    """
    return use.leading[0] if use.leading else 1


def count_attended_points(attention: nn.MultiheadAttention, query: Tensor) -> int:
    """Return the number of data points in a call of attention; its products have them behind positions.

    Args:
        attention: Any, with ``batch_first`` or without.
        query: The first argument of the call, (p, i), (b, p, i) or (p, b, i).

    Example:
        >>> count_attended_points(nn.MultiheadAttention(4, 2, batch_first=True), torch.ones(5, 3, 4))
        5
    """
    return 1 if query.dim() == 2 else query.shape[0 if attention.batch_first else 1]


class _RowHook:
    """The hook on a product's node, called when the node is done.

    A hook before it would use up what checkpointing hands out once. The node is asked for at the call, not held: it
    holds this hook.
    """

    def __init__(self, use: MatrixUse, receive: Callable[[Rows | None], None]) -> None:
        self._receive, self._place, self._is_reversed = receive, use.operand, use.is_reversed
        self._operand = OPERANDS[use.node.name(), use.operand]

    def __call__(self, input_gradients: tuple[Tensor | None, ...], output_gradients: tuple[Tensor | None, ...]) -> None:
        """Pair what the weight multiplied with the gradient of the product."""
        gradient = output_gradients[0]
        is_wanted = gradient is not None and input_gradients[self._place] is not None
        if is_wanted and not is_transformed() and not is_batched(gradient):
            with torch.no_grad():
                rows = self._read(gradient.detach())
            self._receive(rows)

    def _read(self, gradient: Tensor) -> Rows | None:
        """Return the rows, or None if they are lost."""
        try:
            other = getattr(torch._C._current_autograd_node(), self._operand.saved)
        except CheckpointError:
            return None
        if other.layout is not torch.strided:
            return None
        parts = (other.detach(), gradient)
        if self._operand.has_data_in_columns:
            parts = tuple(part.mT for part in parts)
        rows = [part.reshape(-1, part.shape[-1]) for part in parts]
        return Rows(*(reversed(rows) if self._is_reversed else rows))


def _place(part: Tensor, block: range, size: int) -> Tensor:
    """Put a block of the last axis where it belongs among zeros."""
    if len(block) == size:
        return part
    return functional.pad(part, (block.start, size - block.stop))
