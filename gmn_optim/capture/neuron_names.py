"""How the names of neurons pass through tensor operations.

The names of a tensor's neurons are whole numbers in a tensor with as many axes, of size one where all elements along an
axis have one name; -1 is a neuron of which nothing is known. What moves elements moves names; what works on every
element by itself keeps them, and where two operands have names, these mean the same neuron. An operation that no rule
knows returns neurons of which nothing is known.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

UNKNOWN = -1

Names = Tensor | None
Lookup = Callable[[Tensor], Names]
Equate = Callable[[Tensor, Tensor], None]
Operation = torch._ops.OpOverload

_MOVING = frozenset(
    "view _unsafe_view reshape _reshape_alias permute transpose t expand unsqueeze squeeze slice select split "
    "split_with_sizes unsafe_split unbind repeat roll flip index_select index gather cat stack constant_pad_nd".split()
)
_KEEPING = frozenset(
    "clone alias detach lift_fresh _to_copy contiguous native_dropout _softmax _log_softmax native_layer_norm "
    "native_group_norm native_batch_norm _native_batch_norm_legit _batch_norm_with_update cudnn_batch_norm "
    "_fused_rms_norm masked_fill _prelu_kernel log_sigmoid_forward rrelu_with_noise rrelu_with_noise_ hardswish "
    "hardswish_ mish_ threshold_".split()
)
_RUNNING = frozenset("cumsum cumprod logcumsumexp".split())
_REDUCING = frozenset("mean sum amax amin max min var std logsumexp prod norm linalg_vector_norm".split())
_ATTENDING = frozenset(
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_fused_attention_overrideable scaled_dot_product_attention".split()
)
_MULTIPLYING = {"mm": (0, 1), "bmm": (0, 1), "matmul": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
_RESIZING = {f"{what}{n}d": n for what in ("pool", "nearest", "exact", "linear", "cubic") for n in (1, 2, 3)}


def pass_names(
    operation: Operation, args: Sequence[Any], kwargs: dict[str, Any], output: Any, lookup: Lookup, equate: Equate
) -> list[Names]:
    """Return the names of each tensor that an operation returned.

    Args:
        operation: What was called.
        args: Its arguments.
        kwargs: Its arguments by keyword.
        output: What it returned.
        lookup: Returns the names of a tensor, or None.
        equate: Notes that two tensors of names, of one shape, mean the same neurons.

    Example:
        >>> add, ones = torch.ops.aten.add.Tensor, torch.ones(2, 3)
        >>> names = torch.arange(3).view(1, 3)
        >>> pass_names(add, (ones, 1.0), {}, ones + 1, lambda tensor: names, lambda one, other: None)
        [tensor([[0, 1, 2]])]
    """
    name = operation._schema.name.removeprefix("aten::")
    outputs = [each for each in _pytree.tree_leaves(output) if isinstance(each, Tensor)]
    if name in _MOVING and not operation._schema.is_mutable:
        return _moved(operation, args, kwargs, outputs, lookup)
    if name in _KEEPING:
        return _first_only(_of_shape(lookup(_tensors(args)[0]), outputs[0]), outputs)
    if torch.Tag.pointwise in operation.tags:
        return [_pointwise(_tensors(args), each, lookup, equate) for each in outputs]
    if name in _RUNNING:
        return [_without_variation(lookup(args[0]), _argument(operation, args, kwargs, "dim"))]
    if name == "copy_":
        return [_copied(lookup(args[1]), outputs[0])]
    if name in _REDUCING:
        return _first_only(_reduced(operation, args, kwargs, outputs[0], lookup), outputs)
    if name in _MULTIPLYING:
        left, right = (args[place] for place in _MULTIPLYING[name])
        return [_multiplied(lookup(left), lookup(right))]
    if name in _ATTENDING:
        return _first_only(_attended(lookup(args[2]), outputs[0]), outputs)
    if name == "glu":
        return [_gated(lookup(args[0]), args[1] if len(args) > 1 else -1, equate)]
    spatial = next((n for ending, n in _RESIZING.items() if ending in name), None)
    if spatial is not None:
        return _first_only(_resized(lookup(_tensors(args)[0]), spatial), outputs)
    return [None] * len(outputs)


def varied_axes(names: Tensor) -> list[int]:
    """Return the axes along which names differ.

    Example:
        >>> varied_axes(torch.arange(3).view(1, 3, 1))
        [1]
    """
    return [axis for axis, size in enumerate(names.shape) if size > 1]


def compress(names: Tensor) -> Tensor:
    """Return names with size one on every axis along which they are equal.

    Example:
        >>> compress(torch.arange(3).expand(2, 3)).shape
        torch.Size([1, 3])
    """
    for axis in range(names.dim()):
        first = names.narrow(axis, 0, min(1, names.shape[axis]))
        if names.stride(axis) == 0 or bool((names == first).all()):
            names = first
    return names


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    """Return the tensors among the arguments."""
    return [each for each in _pytree.tree_leaves(list(args)) if isinstance(each, Tensor)]


def _first_only(names: Names, outputs: Sequence[Tensor]) -> list[Names]:
    """Return names of the first output, none of the others (statistics, random states)."""
    return [names, *[None] * (len(outputs) - 1)]


def _of_shape(names: Names, output: Tensor) -> Names:
    """Return names only if they can be those of this tensor."""
    return names if names is not None and names.dim() == output.dim() else None


def _moved(
    operation: Operation, args: Sequence[Any], kwargs: dict[str, Any], outputs: Sequence[Tensor], lookup: Lookup
) -> list[Names]:
    """Return names moved the way that the operation moves elements."""
    # of a gather or an index only the first argument has neurons; cat and stack have several, in a list
    first, rest = args[0], args[1:]
    operands = list(first) if isinstance(first, (list, tuple)) else [first]
    if all(lookup(each) is None for each in operands):
        return [None] * len(outputs)
    spread = [_spread(each, lookup) for each in operands]
    name = operation._schema.name.removeprefix("aten::")
    if name in ("view", "_unsafe_view", "_reshape_alias"):
        return [compress(spread[0].reshape(outputs[0].shape))]
    if name == "constant_pad_nd":
        rest = (rest[0], UNKNOWN)
    moved = operation(spread if isinstance(first, (list, tuple)) else spread[0], *rest, **kwargs)
    return [compress(each) for each in _pytree.tree_leaves(moved)]


def _spread(tensor: Tensor, lookup: Lookup) -> Tensor:
    """Return names with the tensor's shape, unknown ones where it has none."""
    names = lookup(tensor)
    if names is None:
        names = torch.full([1] * tensor.dim(), UNKNOWN)
    return names.expand(tensor.shape)


def _pointwise(operands: Sequence[Tensor], output: Tensor, lookup: Lookup, equate: Equate) -> Names:
    """Return the names that all operands agree on, and note that they mean the same neurons."""
    known = [_with_axes(names, output.dim()) for each in operands if (names := lookup(each)) is not None]
    telling = [names for names in known if varied_axes(names)] or known
    if not telling or any(names.shape != telling[0].shape for names in telling[1:]):
        return None  # nothing known, or an outer sum, whose elements belong to two neurons each
    for other in telling[1:]:
        equate(telling[0], other)
    first = telling[0]
    for other in telling[1:]:
        first = torch.where(first == UNKNOWN, other, first)
    return first


def _with_axes(names: Tensor, axes: int) -> Tensor:
    """Return names with leading axes of size one, as broadcasting adds them."""
    return names.reshape([1] * (axes - names.dim()) + list(names.shape))


def _copied(names: Names, output: Tensor) -> Names:
    """Return the names of what was written over a tensor."""
    return None if names is None else _with_axes(names, output.dim())


def _argument(operation: Operation, args: Sequence[Any], kwargs: dict[str, Any], name: str) -> Any:
    """Return the argument that an operation calls so, or None."""
    places = [argument.name for argument in operation._schema.arguments]
    return dict(zip(places, args, strict=False)).get(name, kwargs.get(name))


def _reduced(
    operation: Operation, args: Sequence[Any], kwargs: dict[str, Any], output: Tensor, lookup: Lookup
) -> Names:
    """Return names after a reduction over axes along which they are equal."""
    names, axes = lookup(args[0]), _argument(operation, args, kwargs, "dim")
    if names is None:
        return None
    axes = [axes] if isinstance(axes, int) else list(axes or range(names.dim()))
    if any(names.shape[axis] > 1 for axis in axes):
        return None
    return names if names.dim() == output.dim() else names.amax(axes)


def _multiplied(left: Names, right: Names) -> Names:
    """Return the names of the free axes of a product, where one operand alone has any."""
    left, right = _without_variation(left, -1), _without_variation(right, -2)
    if (left is None) == (right is None):
        return None
    return left if right is None else right


def _attended(names: Names, output: Tensor) -> Names:
    """Return the names of what attention makes of values (..., heads, tokens, n); several heads may share values."""
    names = _without_variation(names, -2)
    if names is None or names.shape[-3] in (1, output.shape[-3]):
        return names
    return names.repeat_interleave(output.shape[-3] // names.shape[-3], -3)


def _without_variation(names: Names, axis: int) -> Names:
    """Return names if they are equal along an axis."""
    return names if names is not None and names.shape[axis] == 1 else None


def _gated(names: Names, axis: int, equate: Equate) -> Names:
    """Return the names of ``a * sigmoid(b)``, a and b being the halves along an axis."""
    if names is None or names.shape[axis] == 1:
        return names
    first, second = names.chunk(2, axis)
    equate(first, second)
    return first


def _resized(names: Names, spatial: int) -> Names:
    """Return names that do not differ along the last so many axes, which a pooling or an interpolation changes."""
    if names is None or names.dim() <= spatial or any(size > 1 for size in names.shape[-spatial:]):
        return None
    return names


class SameNames:
    """Which names mean the same neuron.

    Example:
        >>> same = SameNames()
        >>> one, other = same.fresh(2), same.fresh(2)
        >>> same.equate(one, other)
        >>> same.settle(other)
        (0, 1)
    """

    def __init__(self) -> None:
        self._parents: list[int] = []

    def fresh(self, count: int) -> Tensor:
        """Return so many new names (count)."""
        start = len(self._parents)
        self._parents.extend(range(start, start + count))
        return torch.arange(start, start + count)

    def equate(self, names: Tensor, others: Tensor) -> None:
        """Note that two tensors of names, of one shape, mean the same neurons."""
        for one, other in set(self._pairs(names, others)):
            if UNKNOWN not in (one, other):
                one, other = sorted((self._root(one), self._root(other)))
                self._parents[other] = one

    def settle(self, names: Tensor) -> tuple[int, ...]:
        """Return one name for each neuron, equal for all that mean the same."""
        return tuple(self._root(name) for name in names.tolist())

    def _pairs(self, names: Tensor, others: Tensor) -> Iterator[tuple[int, int]]:
        """Yield names that stand at the same place."""
        return zip(names.flatten().tolist(), others.flatten().tolist(), strict=True)

    def _root(self, name: int) -> int:
        """Return the name that stands for all that mean the same."""
        while self._parents[name] != name:
            self._parents[name] = name = self._parents[self._parents[name]]
        return name
