"""Uses of served weights outside of their modules: found in the graph, and reported as if the layer had been called."""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from gmn_optim.capture.graph import PRODUCTS, BiasUse, MatrixUse, find_matrix_uses
from gmn_optim.capture.graph_rows import Rows, count_attended_points, count_data_points, fold_rows, widen_block
from gmn_optim.capture.graph_views import find_block
from gmn_optim.capture.layers import LayerGroup, ServedLayer
from gmn_optim.capture.linear import LinearAdapter
from gmn_optim.capture.watching import CallTally, LayerUse, Watcher

LARGEST_CALL = 256
"""The most nodes to look at behind the output of one layer."""


class RowOrder(NamedTuple):
    """How rows belong to data points: their number (0 for one each), and whether those of one are neighbours."""

    data_points: int
    points_lead: bool


ONE_EACH = RowOrder(0, True)


class CallPlace(NamedTuple):
    """Where a use stands among layer calls; the last arguments of :class:`~gmn_optim.capture.watching.LayerUse`."""

    forward: int
    call: int
    tally: CallTally
    made_in: int


class FoundUse(NamedTuple):
    """A product with a served weight that belongs to no module's call.

    Attributes:
        layer: The layer with that weight.
        use: The product; keeps the graph alive.
        order: How its rows belong to data points.
        is_turned: Whether the layer's matrix is the transpose of the weight.
    """

    layer: ServedLayer
    use: MatrixUse
    order: RowOrder
    is_turned: bool


class OutsideUse:
    """What receives the rows of a found use, and reports them as a call of the layer.

    Args:
        watcher: Gets the report; held weakly, like the weight.
        found: The use; of its graph nothing is kept.
        place: Where it stands among layer calls.
    """

    def __init__(self, watcher: Watcher, found: FoundUse, place: CallPlace) -> None:
        self._watcher, self._weight = weakref.ref(watcher), weakref.ref(found.use.weight)
        self._layer, self._order, self._is_turned = found.layer, found.order, found.is_turned
        self._block, self._place = found.use.block, place

    def __call__(self, rows: Rows | None) -> None:
        """Report what one backward pass left."""
        watcher, weight = self._watcher(), self._weight()
        if watcher is None or weight is None:
            return
        if rows is None:
            watcher.see_loss(weight)
            return
        activations, backprops = widen_block(fold_rows(rows, *self._order), self._block)
        if self._is_turned:
            activations, backprops = backprops, activations
        LayerUse(watcher, self._layer, weight, activations, backprops.shape, *self._place)(backprops)


class OutsideUses:
    """Tells which products in a graph belong to no call of a served layer.

    Attributes:
        layers: The served layers.

    Example:
        >>> from gmn_optim.capture.layers import find_layers
        >>> layer, x = nn.Linear(3, 2), torch.ones(5, 3)
        >>> outside = OutsideUses()
        >>> outside.layers = tuple(find_layers(layer))
        >>> output = layer(x)
        >>> outside.claim(output, x)
        >>> [found.layer.name for found in outside.find(output + nn.functional.linear(x, layer.weight), x)]
        ['']
    """

    def __init__(self) -> None:
        self.layers: tuple[ServedLayer, ...] = ()
        self._key = object()  # two captures of one model must not read each other's marks
        self._without_bias: dict[int, weakref.ref[nn.Parameter]] = {}

    def claim(self, output: Any, inputs: Any) -> None:
        """Mark the products between a layer's input and output as the layer's own."""
        waiting = _nodes_of(output)
        met = {*waiting, *_nodes_of(inputs)}
        while waiting and len(met) < LARGEST_CALL:
            node = waiting.pop()
            if node.name() in PRODUCTS:
                node.metadata[self._key] = True
            new = {step for step, _ in node.next_functions if step is not None} - met
            waiting.extend(new)
            met |= new

    def find(self, outputs: Any, inputs: Any) -> list[FoundUse]:
        """Find and mark the products of a forward pass that no layer claims."""
        return list(self._find(outputs, inputs, self.layers, None))

    def find_inside(self, attention: nn.MultiheadAttention, query: Tensor, outputs: Any, inputs: Any) -> list[FoundUse]:
        """Find and mark the products in one call of attention."""
        inside = set(attention.modules())
        layers = [layer for layer in self.layers if layer.module in inside]
        order = RowOrder(count_attended_points(attention, query), points_lead=False)
        return list(self._find(outputs, inputs, layers, order))

    def trim(self, group: LayerGroup) -> LayerGroup:
        """Return a group without its bias if the weight was ever used without it: then the sum is not its gradient."""
        if not _is_in(self._without_bias, group.weight):
            return group
        kept = {name: parameter for name, parameter in group.parameters.items() if parameter is group.weight}
        return group._replace(parameters=kept)

    def _find(
        self, outputs: Any, inputs: Any, layers: Iterable[ServedLayer], order: RowOrder | None
    ) -> Iterator[FoundUse]:
        """Yield the products with weights of ``layers`` that are not marked, and mark them."""
        by_weight = {id(layer.weight()): layer for layer in layers}
        parameters = {id(p): p for layer in by_weight.values() for p in layer.parameters().values()}
        uses = find_matrix_uses(_tensors_in(outputs), parameters.values(), _tensors_in(inputs), self._is_marked)
        for use in uses.products:
            use.node.metadata[self._key] = True
            layer = by_weight.get(id(use.weight))
            is_turned = None if layer is None else _is_turned(layer, use.weight)
            if is_turned is not None:
                self._note(layer, use, uses.sums)
                yield FoundUse(layer, use, order or _order_of(layer, use), is_turned)

    def _is_marked(self, node: Node) -> bool:
        """Whether a product belongs to a layer's call, or was found before."""
        return self._key in node.metadata

    def _note(self, layer: ServedLayer, use: MatrixUse, sums: list[BiasUse]) -> None:
        """Remember whether the layer's bias is missing at a use."""
        added = {id(each.bias) for each in sums if each.product is use.node and each.rows == use.block.rows}
        others = [parameter for parameter in layer.parameters().values() if parameter is not use.weight]
        if any(id(other) not in added for other in others):
            self._without_bias[id(use.weight)] = weakref.ref(use.weight)


def _is_turned(layer: ServedLayer, weight: nn.Parameter) -> bool | None:
    """Return whether a layer's matrix is its weight's transpose; None if it cannot take factors (b, p, .) for data."""
    kind, module = type(layer.adapter), layer.module
    if module is None or (kind.activations, kind.backprops) != (LinearAdapter.activations, LinearAdapter.backprops):
        return None
    stand_in = torch.empty(weight.shape, device="meta")
    matrix = layer.adapter.gradient_matrix(module, stand_in)
    found = find_block(weight.shape, matrix) if matrix is stand_in or matrix._base is stand_in else None
    return found[1] if found is not None and found[0].is_whole else None


def _order_of(layer: ServedLayer, use: MatrixUse) -> RowOrder:
    """Return the order that the shape of a use's data tells."""
    # Attention has positions first. Where it was not seen called, nothing tells how many.
    is_attention = isinstance(layer.module, (nn.MultiheadAttention, NonDynamicallyQuantizableLinear))
    return ONE_EACH if is_attention else RowOrder(count_data_points(use), points_lead=True)


def _is_in(table: Mapping[int, weakref.ref[nn.Parameter]], weight: nn.Parameter) -> bool:
    """Whether a table by identity has this parameter: the identity may have passed to a new one."""
    entry = table.get(id(weight))
    return entry is not None and entry() is weight


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a value, also in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(entry)


def _nodes_of(value: Any) -> list[Node]:
    """Return the nodes that made the tensors in a value."""
    return [node for tensor in _tensors_in(value) if (node := tensor.grad_fn) is not None]
