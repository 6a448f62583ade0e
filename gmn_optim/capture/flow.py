"""Which layer's output is which layer's input, found from what really flowed through a forward pass.

Each layer leaves a mark in the autograd node of its output. A later layer walks back from its input through nodes
that act on every element by itself; if all ways end at one mark, the two layers share their neurons. The marks live
in ``Node.metadata`` and die with the graph. What is not proven this way is not claimed.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

LONGEST_WALK = 64

# Backward nodes of operations that map element to element. Where an operation has several operands, all that need
# gradients must lead to the same layer, so that residual sums of two layers are not taken for a connection.
_ELEMENTWISE_OPERATIONS = (
    "Abs Add Addcdiv Addcmul Alias Asinh Atan Celu Clamp ClampMax ClampMin Clone Cos Cosh Div Elu Erf Erfc Exp "
    "Expm1 Gelu Hardshrink Hardsigmoid Hardswish Hardtanh LeakyRelu Lerp Log Log1P LogSigmoid MaskedFill Maximum "
    "Minimum Mish Mul NanToNum NativeDropout FusedDropout Neg Pow PreluKernel Reciprocal Relu Rrelu RreluWithNoise "
    "Rsqrt Rsub Selu Sigmoid Silu Sin Sinc Sinh Softplus Softshrink Sqrt Sub Tan Tanh Threshold ToCopy Where"
)
_ELEMENTWISE = frozenset(f"{name}Backward{n}" for name in _ELEMENTWISE_OPERATIONS.split() for n in range(4))
_PARAMETER_VIEWS = frozenset(
    ("ViewBackward0", "ReshapeAliasBackward0", "ExpandBackward0", "UnsqueezeBackward0", "ToCopyBackward0")
)


class LayerFlow(NamedTuple):
    """Where a layer stands in the model, as far as it is proven.

    Attributes:
        source: Name of the layer whose output, through elementwise operations only, is this layer's input.
        reads_model_input: Whether the layer's input is, or shares storage with, a tensor given to the model.
        is_model_output: Whether a tensor that the model returns is this layer's output, up to elementwise operations.

    Example:
        >>> import torch
        >>> from gmn_optim.capture import GradientCapture
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> with GradientCapture(model) as capture:
        ...     _ = model(torch.ones(5, 3))
        >>> capture.flows()["2"]
        LayerFlow(source='0', reads_model_input=False, is_model_output=True)
    """

    source: str | None
    reads_model_input: bool
    is_model_output: bool


class _Mark(NamedTuple):
    """What a layer leaves at its output; ``forward`` is an object that lives for one root forward pass."""

    name: str
    shape: tuple[int, ...]
    forward: object


class _Call(NamedTuple):
    """One layer call: which weight it used, its source, and whether it read the model's input."""

    weight: int
    source: str | None
    reads_model_input: bool


class FlowTracker:
    """Watches root forward passes and merges what they prove.

    Passes since the last :meth:`clear` are merged: a layer about whose source two of them disagree has none. After
    :meth:`clear` the last result stays until a new pass is complete.

    Example:
        >>> import torch
        >>> tracker, layer, x = FlowTracker(), nn.Linear(3, 3), torch.ones(2, 3)
        >>> tracker.begin((x,), {})
        >>> output = layer(x)
        >>> tracker.see("only", id(layer.weight), x, output)
        >>> tracker.finish(output.relu())
        >>> tracker.flows()
        {'only': LayerFlow(source=None, reads_model_input=True, is_model_output=True)}
    """

    def __init__(self) -> None:
        self._key = object()  # two captures of one model must not read each other's marks
        self._flows: dict[str, LayerFlow] = {}
        self._starts_anew = True
        self._abandon()

    def begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Start a root forward pass with these arguments."""
        self._abandon()
        self._forward = object()
        for tensor in (*_tensors_in(args), *_tensors_in(kwargs)):
            self._inputs.update(_storage_of(tensor))

    def see(self, name: str, weight: int, layer_input: Tensor, output: Tensor) -> None:
        """Take note of one layer call.

        Args:
            name: The layer.
            weight: Identity of the parameter used.
            layer_input: What the weight multiplied.
            output: What the layer returned; its autograd node gets the mark.
        """
        if self._forward is None or output.grad_fn is None:
            return
        source = None
        if layer_input.grad_fn is not None:
            source = self._trace(layer_input)
        reads_model_input = bool(_storage_of(layer_input).items() & self._inputs.items())
        self._calls.setdefault(name, []).append(_Call(weight, source, reads_model_input))
        output.grad_fn.metadata[self._key] = _Mark(name, tuple(output.shape), self._forward)

    def finish(self, output: Any) -> None:
        """End the root forward pass that returned ``output``; None when it failed."""
        if output is not None and self._calls:
            ends = {self._trace(tensor) for tensor in _tensors_in(output)}
            calls = [call for calls in self._calls.values() for call in calls]
            uses = Counter(call.weight for call in calls)
            readers = Counter(call.source for call in calls)
            self._merge({name: self._flow_of(name, ends, uses, readers) for name in self._calls})
        self._abandon()

    def flows(self) -> dict[str, LayerFlow]:
        """Return layer name to what is known of it."""
        return dict(self._flows)

    def clear(self) -> None:
        """Let the next forward pass replace, not extend, what is known."""
        self._starts_anew = True

    def _abandon(self) -> None:
        """Forget the forward pass under way."""
        self._forward: object | None = None
        self._inputs: dict[int, int] = {}
        self._calls: dict[str, list[_Call]] = {}

    def _trace(self, tensor: Tensor) -> str | None:
        """Return the layer of whose output every element of ``tensor`` is a function, element by element."""
        marks: set[_Mark] = set()
        waiting = [tensor.grad_fn] if tensor.grad_fn is not None else []
        met: set[Node] = set(waiting)
        while waiting:
            node = waiting.pop()
            mark = node.metadata.get(self._key)
            if mark is not None:
                marks.add(mark)
            elif node.name() in _ELEMENTWISE and len(met) < LONGEST_WALK:
                new = {step for step, _ in node.next_functions if step is not None} - met
                waiting.extend(new)
                met |= new
            elif not _is_parameter(node):
                return None
        return self._only(marks, tuple(tensor.shape))

    def _only(self, marks: set[_Mark], shape: tuple[int, ...]) -> str | None:
        """Return the name in the single mark of this forward pass, if its shape shows that nothing was broadcast."""
        if len(marks) != 1:
            return None
        mark = next(iter(marks))
        return mark.name if mark.shape == shape and mark.forward is self._forward else None

    def _flow_of(self, name: str, ends: set[str | None], uses: Counter[int], readers: Counter[str | None]) -> LayerFlow:
        """Judge one layer by all calls of this forward pass."""
        calls = self._calls[name]
        source = calls[0].source
        if source is not None:
            is_single = uses[calls[0].weight] == uses[self._calls[source][0].weight] == readers[source] == 1
            source = source if is_single else None
        return LayerFlow(source, all(call.reads_model_input for call in calls), name in ends)

    def _merge(self, flows: dict[str, LayerFlow]) -> None:
        """Join the result of one forward pass with the earlier ones."""
        known = {} if self._starts_anew else self._flows
        self._starts_anew = False
        self._flows = known | {name: _agree(known.get(name, flow), flow) for name, flow in flows.items()}


def _agree(one: LayerFlow, other: LayerFlow) -> LayerFlow:
    """Keep what two forward passes both prove; an output of either is an output."""
    return LayerFlow(
        one.source if one.source == other.source else None,
        one.reads_model_input and other.reads_model_input,
        one.is_model_output or other.is_model_output,
    )


def _is_parameter(node: Node) -> bool:
    """Whether the node only hands on a parameter (the slope of a PReLU, a learned scale)."""
    while node.name() in _PARAMETER_VIEWS and node.next_functions[0][0] is not None:
        node = node.next_functions[0][0]
    return isinstance(getattr(node, "variable", None), nn.Parameter)


def _tensors_in(value: Any, depth: int = 2) -> Iterator[Tensor]:
    """Yield the tensors in a value, also in (flat) tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif depth > 0 and isinstance(value, (tuple, list, Mapping)):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(entry, depth - 1)


def _storage_of(tensor: Tensor) -> dict[int, int]:
    """Return storage address to version; an overwritten input is no longer the input."""
    if tensor.layout is not torch.strided or tensor.is_inference() or tensor.numel() == 0:
        return {}
    return {tensor.untyped_storage().data_ptr(): tensor._version}
