"""The one seam that knows layer kinds: how a module's inputs and output gradients become factors.

A new layer kind is one file with a subclass of :class:`AbstractLayerAdapter` under :func:`register_layer`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from gmn_optim.capture.rows import EVERY_ROW, RowChoice
from gmn_optim.errors import InvalidArgumentError, UnsupportedLayerError
from gmn_optim.gradients import DecomposedGradient
from gmn_optim.neurons import LayerSpec, Structure
from gmn_optim.weight_order import WeightOrder

_ROLES: dict[Structure, tuple[str, ...]] = {
    "matrix": ("weight", "bias"),
    "diagonal": ("scale", "bias"),
    "table": ("table",),
}


class ProbeTerms(NamedTuple):
    """What the factors of one call give for ``G v``, and how large a random sum of the same terms would be.

    Attributes:
        product: Of the rows of ``gradient_matrix`` with each probe (rows, k).
        size: Norm ().
    """

    product: Tensor
    size: Tensor


class AbstractLayerAdapter(ABC):
    """What capture must know of one layer kind. Stateless; one instance serves all modules of the kind.

    A kind whose weight lies as (o, i) needs the four abstract methods only; see ``examples/custom_layer.py``.

    Example:
        >>> import torch
        >>> find_adapter(torch.nn.Linear(3, 2)).widths(torch.nn.Linear(3, 2))
        (3, 2)
    """

    parameter_names: tuple[str, ...] = ("weight", "bias")
    """Names of the module's parameters that the factors explain, the weight first."""

    structure: Structure = "matrix"
    """How the factors become the weight's gradient."""

    arithmetic: torch.dtype | None = None
    """What the layer computes in whatever its input has, where it has a dtype of its own."""

    @abstractmethod
    def select_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the tensor that the weight multiplies from the arguments of a forward call."""

    @abstractmethod
    def activations(self, module: nn.Module, layer_input: Tensor) -> Tensor:
        """Return ``layer_input`` as activations (b, p, i); a table's are the numbers of its rows (b, p, 1)."""

    @abstractmethod
    def backprops(self, module: nn.Module, output_gradient: Tensor) -> Tensor:
        """Return the gradient of the output as backprops (b, p, o)."""

    @abstractmethod
    def widths(self, module: nn.Module) -> tuple[int, int]:
        """Return the number of input and of output neurons (i, o); one input neuron stands for a table's rows."""

    def supports(self, module: nn.Module) -> bool:
        """Whether this very module is served: options of a layer kind may not be."""
        return True

    def groups(self, module: nn.Module) -> int:
        """Return into how many blocks inputs and outputs fall, each output seeing the inputs of its block only."""
        return 1

    def weight_order(self, module: nn.Module) -> WeightOrder | None:
        """Return how the weight lies in memory, None for (o, ...) with the inputs on the other axes."""
        return None

    def spec(self, module: nn.Module) -> LayerSpec:
        """Return what the rule must know of the layer."""
        return LayerSpec(*self.widths(module), self.groups(module), self.structure)

    def roles(self) -> dict[str, str]:
        """Return what part of the layer each of its served parameters is, by name."""
        return dict(zip(self.parameter_names, _ROLES[self.structure], strict=False))

    def neuron_axis(self, module: nn.Module) -> int:
        """Return the axis of the layer's input and output that neurons stand on."""
        return -1

    def input_neurons(self, module: nn.Module, numbers: Tensor) -> Tensor:
        """Return which neuron of the layer's input each of its i activations reads.

        Args:
            module: The layer.
            numbers: Of the neurons on the input's neuron axis (neurons).
        """
        return numbers

    def output_neurons(self, module: nn.Module) -> Tensor:
        """Return which neuron of the layer's output each of its o backprops belongs to (o)."""
        return torch.arange(self.widths(module)[1])

    def recompose(self, module: nn.Module, gradient: DecomposedGradient) -> dict[str, Tensor]:
        """Return the gradient of each served parameter that ``module`` has."""
        weight, *others = self.parameter_names
        matrix = gradient.sum_of_outer_products(self.groups(module))
        order = self.weight_order(module)
        shape = getattr(module, weight).shape
        recomposed = {weight: (matrix if order is None else order.restore(matrix.flatten())).reshape(shape)}
        for name in others:
            if getattr(module, name, None) is not None:
                recomposed[name] = gradient.sum_of_backprops()
        return recomposed

    def gradient_matrix(self, module: nn.Module, gradient: Tensor) -> Tensor:
        """Return the gradient of the weight as the matrix (o, i / groups) that the sum of outer products is."""
        order = self.weight_order(module)
        if order is None:
            return gradient.flatten(1)
        return order.arrange(gradient).reshape(self.widths(module)[1], -1)

    def decompose(
        self, module: nn.Module, layer_input: Tensor, output_gradient: Tensor, rows: RowChoice = EVERY_ROW
    ) -> DecomposedGradient:
        """Return the factors of the chosen rows. Overridden where forming all rows would cost too much."""
        activations, backprops = self.activations(module, layer_input), self.backprops(module, output_gradient)
        return rows.thin(DecomposedGradient(activations, backprops))

    def rows_of(self, module: nn.Module, layer_input: Tensor, output_gradient: Tensor) -> tuple[int, int]:
        """Return the numbers of data points and of positions (b, p) of a call."""
        return self.backprops(module, output_gradient).shape[:2]

    def probe(self, module: nn.Module, layer_input: Tensor, output_gradient: Tensor, probes: Tensor) -> ProbeTerms:
        """Return what all rows of a call give for ``gradient_matrix @ probes``.

        Args:
            module: The layer.
            layer_input: What the weight multiplied.
            output_gradient: Gradient of what the layer returned.
            probes: Vectors on the side of the inputs (i / groups, k).
        """
        groups = self.groups(module)
        activations = self.activations(module, layer_input).flatten(0, 1).unflatten(1, (groups, -1))
        backprops = self.backprops(module, output_gradient).flatten(0, 1)
        return sum_along(activations @ probes, backprops, torch.linalg.vector_norm(activations))


def sum_along(along: Tensor, backprops: Tensor, size: Tensor) -> ProbeTerms:
    """Return the sum over rows of ``g (a . v)``, given the products of the activations with each probe.

    Args:
        along: ``a . v`` of each row, block and probe (r, groups, k).
        backprops: ``g`` (r, o).
        size: Norm of the activations (): those that lie across the probe leave rounding errors of their own size.
    """
    groups = along.shape[1]
    if groups == 1:
        product = backprops.mT @ along[:, 0]
    else:
        product = torch.einsum("rgk,rgo->gok", along, backprops.unflatten(1, (groups, -1))).flatten(0, 1)
    return ProbeTerms(product, size * torch.linalg.vector_norm(backprops) / max(1, len(along)) ** 0.5)


_ADAPTERS: dict[type[nn.Module] | str, AbstractLayerAdapter] = {}
AdapterType = TypeVar("AdapterType", bound=type[AbstractLayerAdapter])


def register_layer(*kinds: type[nn.Module] | str) -> Callable[[AdapterType], AdapterType]:
    """Return a class decorator that makes an adapter serve modules of these types and of their subclasses.

    A later registration for the same type replaces the earlier one, so that users can override ours.

    Args:
        kinds: Module types, or their full names (``"package.module.Type"``) for libraries that are not imported here.

    Raises:
        InvalidArgumentError: a kind is neither a subclass of ``nn.Module`` nor a full name.

    Example:
        >>> import torch
        >>> class Doubled(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return super().forward(2 * x)
        >>> from gmn_optim.capture.linear import LinearAdapter
        >>> @register_layer(Doubled)
        ... class DoubledAdapter(LinearAdapter):
        ...     def activations(self, module, layer_input):
        ...         return super().activations(module, 2 * layer_input)
        >>> type(find_adapter(Doubled(3, 2))).__name__
        'DoubledAdapter'
    """
    for kind in kinds:
        is_type = isinstance(kind, type) and issubclass(kind, nn.Module)
        if not (is_type or (isinstance(kind, str) and "." in kind)):
            raise InvalidArgumentError(
                f"register_layer takes subclasses of nn.Module, or their full names 'module.Type', got {kind!r}"
            )

    def enter(adapter: AdapterType) -> AdapterType:
        for kind in kinds:
            _ADAPTERS[kind] = adapter()
        return adapter

    return enter


def find_adapter(module: nn.Module) -> AbstractLayerAdapter | None:
    """Return the adapter of the nearest registered type in the module's class hierarchy, or None.

    A subclass that defines a ``forward`` of its own is not served by its parent's adapter: nothing is known of
    what it computes.
    """
    for kind in type(module).__mro__:
        adapter = _ADAPTERS.get(kind) or _ADAPTERS.get(f"{kind.__module__}.{kind.__qualname__}")
        if adapter is not None:
            return adapter if adapter.supports(module) else None
        if "forward" in vars(kind):
            return None
    return None


def require_adapter(module: nn.Module, name: str = "") -> AbstractLayerAdapter:
    """Return the adapter of ``module``.

    Raises:
        UnsupportedLayerError: no adapter serves this type.
    """
    adapter = find_adapter(module)
    if adapter is None:
        raise UnsupportedLayerError(
            f"layer {name!r} is a {type(module).__name__}, which no adapter serves; supported are "
            f"{', '.join(kind if isinstance(kind, str) else kind.__name__ for kind in _ADAPTERS)}. Register one with "
            f"gmn_optim.capture.register_layer({type(module).__name__})."
        )
    return adapter


def supported_layers() -> tuple[type[nn.Module] | str, ...]:
    """Return the registered module types, or their full names.

    Example:
        >>> import torch
        >>> torch.nn.Linear in supported_layers()
        True
    """
    return tuple(_ADAPTERS)
