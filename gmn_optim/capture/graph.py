"""Where an autograd graph multiplies by a parameter.

Hooks on modules miss weights that are used as functions: ``F.linear(x, layer.weight)``, tied heads, attention. Here
the graph is searched, from its outputs, for products with a view of a parameter as an operand. What is not understood
is reported as such; nothing is guessed. ``graph_rows`` reads what the products leave in a backward pass.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from gmn_optim.capture.graph_views import VIEWS, Block, find_block, replay_views

NOT_UNDERSTOOD = "{} reads it, which is not understood as a matrix product, a sum or a view"
HANDED_OUT = "it is itself, up to a view, an output"


class MatrixUse(NamedTuple):
    """One product of which one operand is a block of a parameter.

    The record keeps the graph alive: hook it and let go of it.

    Attributes:
        weight: The parameter.
        node: The product's backward node.
        operand: Place of the parameter among the inputs of ``node``.
        is_transposed: Whether the operand is the block's transpose.
        is_reversed: Whether data enter by the block's rows and leave by its columns (``x @ weight``).
        block: The rows and columns of the weight that are used.
        leading: Shape of the data, without the axis that is multiplied, from before it was flattened to rows; just
            the number of rows where that is not known.

    Example:
        >>> layer = nn.Linear(3, 4)
        >>> output = nn.functional.linear(torch.ones(5, 2, 3), layer.weight[1:])
        >>> use = find_matrix_uses([output], [layer.weight]).products[0]
        >>> use.node.name(), use.is_transposed, use.is_reversed, use.block.rows, use.leading
        ('MmBackward0', True, False, range(1, 4), (5, 2))
    """

    weight: nn.Parameter
    node: Node
    operand: int
    is_transposed: bool
    is_reversed: bool
    block: Block
    leading: tuple[int, ...]


class BiasUse(NamedTuple):
    """One sum to which a parameter with a single axis is added, along the sum's last axis.

    Attributes:
        bias: The parameter.
        node: The sum's backward node. The bias's gradient is that of the sum, added up over all other axes.
        rows: The bias's elements that are used.
        product: The node of the product to which the bias is added, if it is one that is understood.

    Example:
        >>> layer = nn.Linear(3, 4)
        >>> [use.rows for use in find_matrix_uses([layer(torch.ones(5, 3))], [layer.bias]).sums]
        [range(0, 4)]
    """

    bias: nn.Parameter
    node: Node
    rows: range
    product: Node | None


class UnknownUse(NamedTuple):
    """A use of a parameter that is not understood.

    Attributes:
        weight: The parameter.
        node: What reads it, or None for an output of the graph.
        reason: What is not understood.

    Example:
        >>> weight = nn.Parameter(torch.ones(3, 3))
        >>> find_matrix_uses([weight.exp()], [weight]).unknown[0].reason
        'ExpBackward0 reads it, which is not understood as a matrix product, a sum or a view'
    """

    weight: nn.Parameter
    node: Node | None
    reason: str


class ParameterUses(NamedTuple):
    """All uses of some parameters in a graph, each in one of three lists.

    Example:
        >>> ParameterUses([], [], []).products
        []
    """

    products: list[MatrixUse]
    sums: list[BiasUse]
    unknown: list[UnknownUse]


class Operand(NamedTuple):
    """How a product's node holds the other operand, and how the two lie.

    Attributes:
        saved: Attribute of the node with the other operand.
        other: Place of the other operand among the node's inputs.
        has_data_in_columns: Whether the other operand and the result have their data rows in columns.
        is_output_first: Whether this operand's axes are (output, input), not (input, output).

    Example:
        >>> OPERANDS["MmBackward0", 1].saved
        '_saved_self'
    """

    saved: str
    other: int
    has_data_in_columns: bool
    is_output_first: bool


OPERANDS = {
    ("MmBackward0", 0): Operand("_saved_mat2", 1, True, True),
    ("MmBackward0", 1): Operand("_saved_self", 0, False, False),
    ("AddmmBackward0", 1): Operand("_saved_mat2", 2, True, True),
    ("AddmmBackward0", 2): Operand("_saved_mat1", 1, False, False),
    ("BmmBackward0", 0): Operand("_saved_mat2", 1, True, True),
    ("BmmBackward0", 1): Operand("_saved_self", 0, False, False),
    ("BaddbmmBackward0", 1): Operand("_saved_batch2", 2, True, True),
    ("BaddbmmBackward0", 2): Operand("_saved_batch1", 1, False, False),
    ("MvBackward0", 0): Operand("_saved_vec", 1, False, True),
    # Devices with a kernel of their own for F.linear (MPS is one) do not break it down to the products above.
    ("LinearBackward0", 1): Operand("_saved_input", 0, False, True),
}
"""Name of a backward node and place of the parameter among its inputs, to what else the node knows."""

PRODUCTS = frozenset(name for name, _ in OPERANDS)
"""Names of the backward nodes of products."""

_ADDENDS = frozenset(
    [("AddmmBackward0", 0), ("BaddbmmBackward0", 0), ("LinearBackward0", 2), ("AddBackward0", 0), ("AddBackward0", 1)]
)
_RESHAPES = frozenset(("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"))


class _Consumer(NamedTuple):
    """An edge of the graph, seen from below: who reads it (None outside the graph), and where."""

    node: Node | None
    place: int
    output: int


_Consumers = dict[Node, list[_Consumer]]
_Path = tuple[tuple[Node, int], ...]


def find_matrix_uses(
    outputs: Iterable[Tensor],
    weights: Iterable[nn.Parameter],
    stop_at: Iterable[Tensor] = (),
    is_known: Callable[[Node], bool] | None = None,
) -> ParameterUses:
    """Find every use of some parameters in the graph that leads to ``outputs``.

    Each node is visited once. Parameters that need no gradient are not in the graph, and have no uses.

    Args:
        outputs: Tensors that the graph leads to.
        weights: The parameters to look for.
        stop_at: Tensors behind which the search does not go on, such as what a module was called with.
        is_known: Tells the nodes whose uses of parameters need not be reported.

    Example:
        >>> table, layer = nn.Embedding(9, 3), nn.Linear(3, 3)
        >>> tied = layer(torch.ones(5, 3)) @ table.weight.T
        >>> uses = find_matrix_uses([tied], [layer.weight, layer.bias, table.weight])
        >>> [use.block.rows for use in uses.products], len(uses.sums), uses.unknown
        ([range(0, 3), range(0, 9)], 1, [])
    """
    stops = {tensor.grad_fn for tensor in stop_at if tensor.grad_fn is not None}
    consumers = _find_consumers([tensor for tensor in outputs if tensor.requires_grad], stops)
    leaves = {id(node.variable): node for node in consumers if hasattr(node, "variable")}
    uses = ParameterUses([], [], [])
    with torch.no_grad():
        for weight in weights:
            for consumer, path in _follow(leaves.get(id(weight)), consumers):
                if is_known is None or consumer.node is None or not is_known(consumer.node):
                    _classify(weight, consumer, replay_views(weight.shape, path), consumers, uses)
    return uses


def _find_consumers(outputs: Sequence[Tensor], stops: set[Node]) -> _Consumers:
    """Walk the graph and return for each node who reads it."""
    consumers: _Consumers = {}
    for edge in map(get_gradient_edge, outputs):
        consumers.setdefault(edge.node, []).append(_Consumer(None, 0, edge.output_nr))
    waiting = [node for node in consumers if node not in stops]
    while waiting:
        reader = waiting.pop()
        for place, (node, output) in enumerate(reader.next_functions):
            if node is not None:
                if node not in consumers:
                    consumers[node] = []
                    if node not in stops:
                        waiting.append(node)
                consumers[node].append(_Consumer(reader, place, output))
    return consumers


def _follow(leaf: Node | None, consumers: _Consumers) -> Iterator[tuple[_Consumer, _Path]]:
    """Yield what reads a leaf of the graph, or a view of it, and the views on the way there."""
    waiting: list[tuple[Node, _Path]] = [] if leaf is None else [(leaf, ())]
    while waiting:
        node, path = waiting.pop()
        for consumer in consumers[node]:
            way = path if node is leaf else (*path, (node, consumer.output))
            if consumer.node is not None and consumer.node.name() in VIEWS:
                waiting.append((consumer.node, way))
            else:
                yield consumer, way


def _classify(
    weight: nn.Parameter, consumer: _Consumer, view: Tensor | None, consumers: _Consumers, uses: ParameterUses
) -> None:
    """Put one use where it belongs."""
    node, place, _ = consumer
    if node is None:
        uses.unknown.append(UnknownUse(weight, None, HANDED_OUT))
    elif view is None:
        uses.unknown.append(UnknownUse(weight, node, NOT_UNDERSTOOD.format(node.name())))
    elif (product := _as_product(weight, node, place, view, consumers)) is not None:
        uses.products.append(product)
    elif (elements := _as_addend(weight, node, place, view)) is not None:
        uses.sums.append(BiasUse(weight, node, elements, _product_below(node, place)))
    else:
        uses.unknown.append(UnknownUse(weight, node, NOT_UNDERSTOOD.format(node.name())))


def _as_product(weight: nn.Parameter, node: Node, place: int, view: Tensor, consumers: _Consumers) -> MatrixUse | None:
    """Describe a product that is understood."""
    operand = OPERANDS.get((node.name(), place))
    found = None if operand is None or not _is_plain(node) else find_block(weight.shape, view)
    if found is None:
        return None
    block, is_transposed = found
    leading = _find_leading(node, operand, consumers)
    return MatrixUse(weight, node, place, is_transposed, is_transposed == operand.is_output_first, block, leading)


def _as_addend(bias: nn.Parameter, node: Node, place: int, view: Tensor) -> range | None:
    """Return which elements of ``bias`` are added along the last axis of a sum."""
    if bias.dim() != 1 or (node.name(), place) not in _ADDENDS or not _is_plain(node):
        return None
    is_last = view.dim() > 0 and view.numel() == view.shape[-1] == node._input_metadata[0].shape[-1]
    if not is_last or (view.stride(-1) != 1 and view.numel() > 1):
        return None
    return range(view.storage_offset(), view.storage_offset() + view.numel())


def _product_below(node: Node, place: int) -> Node | None:
    """Return the product to whose result a sum adds something at ``place``: the sum's own, or its other term."""
    if node.name() != "AddBackward0":
        return node
    term = node.next_functions[1 - place][0]
    while term is not None and term.name() in _RESHAPES:
        term = term.next_functions[0][0]
    return term if term is not None and term.name() in PRODUCTS else None


def _is_plain(node: Node) -> bool:
    """Whether a node's result is an ordinary real tensor, and neither operand nor addend was scaled."""
    result = node._input_metadata[0]
    is_scaled = getattr(node, "_saved_alpha", 1) != 1 or getattr(node, "_saved_beta", 1) != 1
    return result.dtype.is_floating_point and not result.is_nested_tensor and not is_scaled


def _find_leading(node: Node, operand: Operand, consumers: _Consumers) -> tuple[int, ...]:
    """Return the shape of a product's data, looked up at both sides if they were flattened to rows for it."""
    shape = tuple(node._input_metadata[0].shape)
    leading = (*shape[:-2], shape[-1]) if operand.has_data_in_columns else shape[:-1]
    if operand.has_data_in_columns or not leading or prod(leading[:-1]) != 1:
        return leading
    source = node.next_functions[operand.other][0]
    sizes = [source._saved_self_sym_sizes] if source is not None and source.name() in _RESHAPES else []
    readers = [reader.node for reader in consumers[node] if reader.node is not None]
    sizes += [reader._input_metadata[0].shape for reader in readers if reader.name() in _RESHAPES]
    return max((_prefix(each, leading[-1]) for each in sizes), key=len, default=()) or leading


def _prefix(sizes: Sequence[int], count: int) -> tuple[int, ...]:
    """Return the first sizes with this product, or nothing."""
    ends = [end for end in range(1, len(sizes) + 1) if prod(sizes[:end]) == count]
    return tuple(sizes[: ends[0]]) if ends else ()
