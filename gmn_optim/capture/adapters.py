"""The one seam that knows layer kinds: how a module's inputs and output gradients become factors.

A new layer kind is one file with a subclass of :class:`AbstractLayerAdapter` under :func:`register_layer`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from gmn_optim.errors import InvalidArgumentError, UnsupportedLayerError
from gmn_optim.gradients import DecomposedGradient


class AbstractLayerAdapter(ABC):
    """What capture must know of one layer kind. Stateless; one instance serves all modules of the kind.

    Example:
        >>> import torch
        >>> find_adapter(torch.nn.Linear(3, 2)).widths(torch.nn.Linear(3, 2))
        (3, 2)
    """

    parameter_names: tuple[str, ...] = ("weight", "bias")
    """Names of the module's parameters that the factors explain."""

    @abstractmethod
    def select_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the tensor that the weight multiplies from the arguments of a forward call."""

    @abstractmethod
    def activations(self, module: nn.Module, layer_input: Tensor) -> Tensor:
        """Return ``layer_input`` as activations (b, p, i)."""

    @abstractmethod
    def backprops(self, module: nn.Module, output_gradient: Tensor) -> Tensor:
        """Return the gradient of the output as backprops (b, p, o)."""

    @abstractmethod
    def recompose(self, module: nn.Module, gradient: DecomposedGradient) -> dict[str, Tensor]:
        """Return the gradient of each served parameter that ``module`` has."""

    @abstractmethod
    def widths(self, module: nn.Module) -> tuple[int, int]:
        """Return the number of input and of output neurons (i, o)."""

    def gradient_matrix(self, module: nn.Module, gradient: Tensor) -> Tensor:
        """Return the gradient of the weight as the matrix (o, i) that the sum of outer products is.

        A layer whose weight lies otherwise in memory than (o, ...) overrides this.
        """
        return gradient.flatten(1)


_ADAPTERS: dict[type[nn.Module], AbstractLayerAdapter] = {}
AdapterType = TypeVar("AdapterType", bound=type[AbstractLayerAdapter])


def register_layer(*kinds: type[nn.Module]) -> Callable[[AdapterType], AdapterType]:
    """Return a class decorator that makes an adapter serve modules of these types and of their subclasses.

    A later registration for the same type replaces the earlier one, so that users can override ours.

    Args:
        kinds: Module types.

    Raises:
        InvalidArgumentError: a kind is not a subclass of ``nn.Module``.

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
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise InvalidArgumentError(f"register_layer takes subclasses of nn.Module, got {kind!r}")

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
        if kind in _ADAPTERS:
            return _ADAPTERS[kind]
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
            f"{', '.join(kind.__name__ for kind in supported_layers())}. Register one with "
            f"gmn_optim.capture.register_layer({type(module).__name__})."
        )
    return adapter


def supported_layers() -> tuple[type[nn.Module], ...]:
    """Return the registered module types.

    Example:
        >>> import torch
        >>> torch.nn.Linear in supported_layers()
        True
    """
    return tuple(_ADAPTERS)
