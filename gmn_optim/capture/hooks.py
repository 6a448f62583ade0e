"""The eager front end: capture a model's decomposed gradients during ordinary forward and backward passes."""

import weakref
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gmn_optim.capture.diagnosis import verify_groups
from gmn_optim.capture.layers import LayerGroup, ServedLayer, find_layers, group_layers
from gmn_optim.capture.recorder import Recorder
from gmn_optim.capture.records import assemble_factors
from gmn_optim.capture.verification import Verification
from gmn_optim.capture.watching import ContainerEntryHook, ContainerExitHook, InertHook, LayerHook
from gmn_optim.errors import CaptureError, InvalidArgumentError, ModelExpectedError
from gmn_optim.gradients import DecomposedGradient, GradientSet
from gmn_optim.neurons import LayerWiring


class GradientCapture:
    """Captures each data point's activations and backprops of every served layer of a model.

    Hooks are attached at construction and removed by :meth:`close`, at the end of a ``with`` block, or when the
    capture is deleted. The model is held weakly, and so is the capture by its hooks. A copy of the model is free of
    working hooks; a copy of the capture watches nothing.

    Uses of one weight (reused modules, tied weights) are put together: along p within a root forward pass, along b
    between passes. Layers called directly, outside the model's own forward, count as a forward pass each. Captured
    activations share memory with what the layer read, so they hold until that is overwritten.

    Args:
        model: Any module.
        layers: Names of the modules to capture; None for all that an adapter serves.
        rows: The most rows (data points times positions) to keep of a weight for each forward pass, shared evenly by
            its uses; None for all. Backprops are scaled up for what is left out.
        seed: Of the probe that :meth:`verify` uses.

    Raises:
        ModelExpectedError: ``model`` is not a module.
        InvalidArgumentError: ``rows`` is not positive, or a name in ``layers`` is not in the model.
        UnsupportedLayerError: a named layer cannot be captured.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
        >>> with GradientCapture(model) as capture:
        ...     model(torch.randn(5, 3)).square().mean().backward()
        >>> capture.gradients()["2"].backprops.shape
        torch.Size([5, 1, 2])
        >>> {name: verdict.explained for name, verdict in capture.verify().items()}
        {'0': True, '2': True}
        >>> capture.wiring()["2"].inputs == capture.wiring()["0"].outputs
        True
    """

    def __init__(
        self, model: nn.Module, *, layers: Iterable[str] | None = None, rows: int | None = None, seed: int = 0
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ModelExpectedError(_explain_model(model))
        if rows is not None and (not isinstance(rows, int) or rows < 1):
            raise InvalidArgumentError(f"rows is {rows!r}; expected None or a whole number of at least 1")
        if isinstance(layers, str):
            raise InvalidArgumentError(f"layers is one string; write layers=[{layers!r}]")
        self._set_up(None if layers is None else tuple(layers), rows, seed)
        self._model = weakref.ref(model)
        self.attach()

    def _set_up(self, names: tuple[str, ...] | None, rows: int | None, seed: int) -> None:
        """Create the state of a capture that watches nothing."""
        self._names, self._rows, self._seed = names, rows, seed
        self._model: weakref.ref[nn.Module] | None = None
        self._layers: dict[int, ServedLayer] = {}
        self._handles: dict[int | str, RemovableHandle] = {}
        self._containers: dict[int, tuple[str, str]] = {}
        self._steady: dict[str, LayerGroup] | None = None
        self._recorder = Recorder(rows, seed)
        # Not the capture but its table of handles: a finalizer must not keep its object alive.
        weakref.finalize(self, _remove_all, self._handles).atexit = False

    @property
    def enabled(self) -> bool:
        """Whether hooks keep what they see; set it to False to let passes go by."""
        return self._recorder.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._recorder.enabled = value

    @property
    def closed(self) -> bool:
        """Whether no hooks are on the model."""
        return not self._handles

    @property
    def layers(self) -> dict[str, nn.Module]:
        """Layer name to module, for every name under which factors are reported."""
        kinds = [(name, members[0]) for group in self._groups().values() for name, members in group.kinds().items()]
        return {name: first.module for name, first in kinds if first.module is not None}

    def served_parameters(self) -> dict[str, dict[str, Tensor]]:
        """Return for each layer the parameters whose gradients its factors give, by their name in the layer."""
        return {name: dict(group.parameters) for name, group in self._groups().items() if group.adds_up}

    def layer_of(self, parameter: Tensor) -> str | None:
        """Return the layer whose factors give the gradient of ``parameter``, or None.

        The bias of one of several layers that share a weight has none: their factors are put together.
        """
        for name, parameters in self.served_parameters().items():
            if any(served is parameter for served in parameters.values()):
                return name
        return None

    def attach(self) -> None:
        """Hook the model, or only what was added to it since; hooks of modules that left it are removed.

        Raises:
            CaptureError: this capture is a copy, or its model is gone.
        """
        model = None if self._model is None else self._model()
        if model is None:
            raise CaptureError("this capture is a copy, or its model is gone; make one with GradientCapture(model)")
        for module in model.modules():
            _drop_inert_hooks(module)
        found = {id(layer.module): layer for layer in find_layers(model, self._names)}
        if self._layers.keys() != found.keys():
            self._recorder.wiring.trace_again()
        for key in self._layers.keys() - found.keys():
            self._release(key)
        for key, layer in found.items():
            self._hook(key, layer)
        self._layers = {key: self._layers[key] for key in found}
        self._recorder.outside.layers = tuple(self._layers.values())
        self._hook_containers(model)
        self._recorder.is_open = True

    def close(self) -> None:
        """Remove every hook; what was captured stays. Closing twice does nothing."""
        _remove_all(self._handles)
        self._recorder.close()

    def clear(self) -> None:
        """Drop everything that was captured."""
        self._recorder.clear()

    def forget(self) -> None:
        """Drop everything that was captured, and what was noticed that tells causes: a step is over."""
        self._recorder.clear()
        self._recorder.observations.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Capture nothing inside this context."""
        enabled, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = enabled

    def gradients(self, *, for_squares: bool = False) -> GradientSet:
        """Return the decomposed gradients of the backward passes since the last :meth:`clear`.

        Passes before ``zero_grad()`` do not count. After ``zero_grad(set_to_none=False)`` only :meth:`verify` can
        tell; call it first. Layers of different kinds with one weight (an embedding and the last layer) are reported
        one by one, each with its share of the gradient.

        Args:
            for_squares: Where ``rows`` left out some, whether backprops are scaled so that the sum over rows of
                squared gradients is about that of all, instead of the sum of gradients.
        """
        factors, recompositions = {}, {}
        for group in self._groups().values():
            records = self._recorder.store.of(group.weight) if group.adds_up else []
            for name, (first, *_) in group.kinds().items():
                if found := [record for record in records if record.kind is first.adapter]:
                    factors[name] = assemble_factors([each.for_squares() for each in found] if for_squares else found)
                    recompositions[name] = partial(_recompose, first, group.parameters)
        return GradientSet(factors, recompositions)

    def kept_factors(self) -> list[Tensor]:
        """Return every tensor that is kept since the last :meth:`clear`: two for each call of a layer."""
        records = (self._recorder.store.of(group.weight) for group in self._groups().values())
        return [factor for of_weight in records for record in of_weight for factor in record.factors]

    def verify(self) -> dict[str, Verification]:
        """Return for each layer with a gradient whether its factors explain it, and by which scale.

        Costs one small product per layer and one transfer to the host for all. Where the newest backward pass alone
        explains a gradient and all passes together do not, the older ones are dropped.
        """
        recorder = self._recorder
        with torch.no_grad():
            return verify_groups(self._groups(), recorder.store, recorder.probes, recorder.observations)

    def wiring(self) -> dict[str, LayerWiring]:
        """Return what the forward passes prove of each layer's neurons; the same object until there is news."""
        return self._recorder.wiring.wiring()

    def __enter__(self) -> "GradientCapture":
        """Hook the model again if the capture was closed."""
        if self.closed:
            self.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove every hook."""
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as a capture that watches nothing and holds nothing."""
        return _inert_capture, (self._names, self._rows, self._seed)

    def __repr__(self) -> str:
        """Show how many layers are watched."""
        state = "closed" if self.closed else "attached"
        return f"{type(self).__name__}({len(self._groups())} layers, {state})"

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Look only once which layers share weights inside this context, in which none gets another."""
        self._steady = {}  # nobody has looked yet
        try:
            yield
        finally:
            self._steady = None

    def _groups(self) -> dict[str, LayerGroup]:
        """Group the watched layers by the weights that they have now."""
        if self._steady:
            return self._steady
        found = group_layers(self._layers.values())
        groups = {name: self._recorder.outside.trim(group) for name, group in found.items()}
        if self._steady is not None:
            self._steady = groups
        return groups

    def _hook(self, key: int, layer: ServedLayer) -> None:
        """Hook a layer that is not hooked yet."""
        known = self._layers.get(key)
        if key in self._handles and known is not None and known.module is layer.module:
            known.name = layer.name
            return
        self._release(key)
        self._layers[key] = layer
        hook = LayerHook(self._recorder, layer)
        self._handles[key] = layer.module.register_forward_hook(hook, with_kwargs=True)

    def _hook_containers(self, model: nn.Module) -> None:
        """Hook the model, and every part of it that holds other modules: a loop may call a part by itself."""
        containers = {id(module): module for module in model.modules() if module is model or any(module.children())}
        for key in self._containers.keys() - containers.keys():
            for name in self._containers.pop(key):
                self._handles.pop(name).remove()
        for key, module in containers.items():
            if f"entry {key}" not in self._handles:
                entry, leave = ContainerEntryHook(self._recorder), ContainerExitHook(self._recorder)
                self._containers[key] = (f"entry {key}", f"exit {key}")
                # of several captures the last to enter a traced pass is the first to leave it
                self._handles[f"entry {key}"] = module.register_forward_pre_hook(entry, with_kwargs=True, prepend=True)
                self._handles[f"exit {key}"] = module.register_forward_hook(leave, with_kwargs=True, always_call=True)

    def _release(self, key: int) -> None:
        """Remove the hook of one layer, if there is one."""
        handle = self._handles.pop(key, None)
        if handle is not None:
            handle.remove()


def _recompose(layer: ServedLayer, explained: Collection[str], gradient: DecomposedGradient) -> dict[str, Tensor]:
    """Return what the factors of layers of one kind give for the explained parameters."""
    recomposed = layer.adapter.recompose(layer.module, gradient)
    return {name: value for name, value in recomposed.items() if name in explained}


def _drop_inert_hooks(module: nn.Module) -> None:
    """Remove what hooks of the model that this one is a copy of have left."""
    for hooks, marks in (
        (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
        (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
    ):
        for key in [key for key, hook in hooks.items() if isinstance(hook, InertHook)]:
            del hooks[key]
            for mark in marks:
                mark.pop(key, None)


def _remove_all(handles: dict[int | str, RemovableHandle]) -> None:
    """Remove hooks and empty their table."""
    while handles:
        handles.popitem()[1].remove()


def _inert_capture(names: tuple[str, ...] | None, rows: int | None, seed: int) -> GradientCapture:
    """Return a capture without a model."""
    capture = GradientCapture.__new__(GradientCapture)
    capture._set_up(names, rows, seed)
    return capture


def _explain_model(given: object) -> str:
    """Say what to write instead of what was given."""
    what = f"a {type(given).__name__}"
    if isinstance(given, Tensor):
        what += " (a single tensor)"
    elif isinstance(given, Iterable):
        what += " (of parameters, perhaps)"
    return (
        f"GradientCapture needs the model itself, got {what}: parameters alone do not show activations. "
        "Write GradientCapture(model) instead of GradientCapture(model.parameters())."
    )
