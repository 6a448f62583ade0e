"""The callables that sit on a model and on its graph, and report what they see to a recorder that they hold weakly.

A forward hook on each layer puts a tensor hook on the layer's output. What the layer read and the gradient of what it
returned meet in that tensor hook: a forward pass without a backward pass leaves nothing behind, and a tensor hook,
unlike a module's backward hook, stands in-place operations on the output.
"""

import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gmn_optim.capture.layers import ServedLayer

NO_BACKWARD = -1


class CallTally:
    """Number of times that a weight was used in one root forward pass."""

    __slots__ = ("uses",)

    def __init__(self) -> None:
        self.uses = 0


class Watcher(Protocol):
    """What the hooks need of the one that they report to."""

    enabled: bool

    def begin_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note that a forward pass of the model, or of a part of it, starts."""

    def end_forward(self, output: Any) -> None:
        """Note that such a forward pass ended; ``output`` is None when it failed."""

    def see_call(
        self, layer: ServedLayer, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """Note that a layer was called."""

    def see_gradient(self, use: "LayerUse", module: nn.Module, weight: nn.Parameter, gradient: Tensor) -> None:
        """Note that a backward pass reached a layer call."""

    def see_loss(self, weight: nn.Parameter) -> None:
        """Note that a backward pass reached a use of a weight and could not tell what it left."""


class _Unscriptable:
    """Something that ``torch.jit.script`` cannot compile, and says so."""

    def __getattr__(self, name: str) -> Any:
        """Explain what TorchScript misses first."""
        if name == "__name__":
            raise AttributeError("a captured model cannot be scripted: call close() of its optimizer or capture first")
        raise AttributeError(name)


class InertHook(_Unscriptable):
    """What a hook becomes in a copy of the model: it does nothing.

    Example:
        >>> InertHook()(nn.Identity(), (), {}, None)
    """

    def __call__(self, *args: Any) -> None:
        """Do nothing."""


class _ModuleHook(_Unscriptable):
    """A hook on a module that knows whom it reports to weakly and is inert in copies of the module."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher: weakref.ref[Watcher] = weakref.ref(watcher)

    def watcher(self) -> Watcher | None:
        """Return whom to report to: under transforms and tracing there is nothing to keep."""
        return None if is_transformed() else self._watcher()

    def __reduce__(self) -> tuple[type[InertHook], tuple[()]]:
        """Copy and pickle as a hook that does nothing."""
        return InertHook, ()


class LayerHook(_ModuleHook):
    """The forward hook of one layer."""

    def __init__(self, watcher: Watcher, layer: ServedLayer) -> None:
        super().__init__(watcher)
        self._layer = layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Report the call."""
        watcher = self.watcher()
        if watcher is not None and watcher.enabled:
            watcher.see_call(self._layer, module, args, kwargs, output)


class ContainerEntryHook(_ModuleHook):
    """The forward pre-hook of the whole model, and of its parts that hold others."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Report that a forward pass starts."""
        watcher = self.watcher()
        if watcher is not None:
            watcher.begin_forward(module, args, kwargs)


class ContainerExitHook(_ModuleHook):
    """The forward hook of the whole model, and of its parts that hold others; called for failed passes also."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Report that the forward pass is over."""
        watcher = self.watcher()
        if watcher is not None:
            watcher.end_forward(output)


class LayerUse:
    """The tensor hook on the output of one layer call; holds what the layer read until the backward pass comes.

    Args:
        watcher: Gets the report; held weakly, like the weight: the graph must keep neither alive.
        layer: The layer.
        weight: The parameter that was used.
        layer_input: What the weight multiplied, detached.
        shape: Shape of the layer's output.
        forward: Number of the root forward pass.
        call: Running number of the call.
        tally: Counts the uses of the weight in this forward pass.
        made_in: The backward pass that computed the call anew (checkpointing), or -1.
    """

    # Saving a tensor that carries a hook warns otherwise; there is nothing in this one worth saving.
    __torch_unserializable__ = True

    def __init__(
        self,
        watcher: Watcher,
        layer: ServedLayer,
        weight: nn.Parameter,
        layer_input: Tensor,
        shape: torch.Size,
        forward: int,
        call: int,
        tally: CallTally,
        made_in: int,
    ) -> None:
        self._watcher, self._weight = weakref.ref(watcher), weakref.ref(weight)
        self.layer, self.made_in = layer, made_in
        self.layer_input: Tensor | None = layer_input
        self.shape, self.forward, self.call, self.tally = shape, forward, call, tally
        self.is_differentiable = False

    @property
    def backward(self) -> int:
        """The backward pass under way; one started inside another (reentrant checkpointing) belongs to the outer."""
        return self.made_in if self.made_in != NO_BACKWARD else current_backward()

    def __call__(self, gradient: Tensor) -> None:
        """Report the gradient of the output."""
        watcher, module, weight = self._watcher(), self.layer.module, self._weight()
        is_dead = watcher is None or module is None or weight is None or self.layer_input is None
        if is_dead or not watcher.enabled or is_transformed() or is_batched(gradient):
            return
        self.is_differentiable = torch.is_grad_enabled()
        # A backward pass may run with gradients on (create_graph) or inside autocast; neither is wanted here.
        with torch.no_grad(), _without_autocast(gradient.device.type):
            gradient = gradient.detach()
            gradient = gradient if gradient.shape == self.shape else gradient.reshape(self.shape)
            watcher.see_gradient(self, module, weight, gradient)
        if not keeps_graph():
            self.layer_input = None  # the loss that the user still holds would keep it alive


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return a context in which matrix products keep their dtype."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def is_transformed() -> bool:
    """Whether the code runs under tracing or a ``torch.func`` transform, where tensors must not be kept.

    Example:
        >>> is_transformed()
        False
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_batched(gradient: Tensor) -> bool:
    """Whether several backward passes run as one (``is_grads_batched=True``), none of which reaches ``.grad``."""
    return torch._C._functorch.is_legacy_batchedtensor(gradient)


def hooked_tensor(output: Tensor) -> Tensor:
    """Return the tensor on which a hook sees the gradient of ``output`` even if ``output`` is changed in place.

    A view changed in place gets a new node in the graph, and its hooks are lost. ``nn.Linear`` returns a view of a
    matrix for inputs with more than two axes; that matrix has the same gradient in another shape.

    Example:
        >>> hooked_tensor(nn.Linear(3, 2)(torch.ones(5, 4, 3))).shape
        torch.Size([20, 2])
    """
    base = output._base
    if base is None or base.shape.numel() != output.shape.numel() or base.grad_fn is None:
        return output
    return base if base.is_contiguous() and output.is_contiguous() else output


def _never() -> int:
    """Stand in where torch does not tell backward passes apart."""
    return NO_BACKWARD


def _assume_kept() -> bool:
    """Stand in where torch does not tell whether the graph is kept."""
    return True


current_backward: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", _never)
"""Return a number for the backward pass that calls, or -1 outside of one."""

keeps_graph: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", _assume_kept)
"""Return whether the backward pass that calls leaves the graph for another one."""
