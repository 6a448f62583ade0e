"""Inner training of many tasks at once: the update rule, vmapped."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from gmn_optim.capture.adapters import require_adapter
from gmn_optim.capture.functional import capture_gradients, plan_capture
from gmn_optim.capture.hooks import GradientCapture
from gmn_optim.gradients import DecomposedGradient
from gmn_optim.metatrain.fusion import fuse
from gmn_optim.neuron_sets import gather_neurons
from gmn_optim.neurons import NeuronSpaces
from gmn_optim.rule.clock import RefreshClock
from gmn_optim.rule.layout import Layout, Segment, build_chunks
from gmn_optim.rule.update import RuleState, UpdateRule
from gmn_optim.streams import infer_spaces
from gmn_optim.tasks.base import AbstractTask, Batch, Parameters

Meta = dict[str, Tensor]
"""Meta-parameters by their name in the rule, each with a leading axis of unrolls (k) or without."""


class UnrollState(NamedTuple):
    """Inner trainings under way, every tensor with a leading axis of unrolls (k).

    Attributes:
        parameters: Flat parameters of each chunk (k, size).
        rule: The rule's state.
    """

    parameters: tuple[Tensor, ...]
    rule: RuleState


class Unroll:
    """Runs inner trainings of one task under one update rule, K at a time, by ``torch.func.vmap``.

    Args:
        task: The inner problem.
        rule: The update rule; its own meta-parameters are only placeholders for those that are passed in.
        compiled: Whether the steps of perturbed rules are fused by ``torch.compile``: about a minute at first, then
            up to twice as fast. Needs a C++ compiler. Results agree up to rounding.

    Example:
        >>> from gmn_optim.rule import RuleConfig
        >>> from gmn_optim.tasks.quadratic import QuadraticTask
        >>> unroll = Unroll(QuadraticTask(noise=0.0), UpdateRule(RuleConfig(body=None)))
        >>> state = unroll.start(torch.Generator(), 3)
        >>> state, losses = unroll.run(unroll.meta_parameters(), state, unroll.batches(torch.Generator(), 4, 3))
        >>> losses.shape
        torch.Size([4, 3])
    """

    def __init__(self, task: AbstractTask, rule: UpdateRule, compiled: bool = False) -> None:
        self.task = task
        self.rule = rule
        self.compiled = compiled
        self._fused: dict[tuple[bool, bool], Callable[[Meta, UnrollState, Batch], tuple[UnrollState, Tensor]]] = {}
        generator = torch.Generator().manual_seed(0)
        # the wiring is read from the autograd graph, and an outer loop that makes unrolls records none
        with torch.inference_mode(False), torch.enable_grad():
            parameters, batch = task.init_parameters(generator), task.sample_batch(generator)
            self.plan = plan_capture(task.module, lambda: task.loss(parameters, batch))
            spaces = infer_task_spaces(task, parameters, batch)
        self.dtype = next(iter(parameters.values())).dtype
        self.layout = lay_out(task, parameters, spaces, needs_factors=rule.config.needs_factors)

    def meta_parameters(self) -> Meta:
        """Return the rule's own meta-parameters, detached."""
        return {name: parameter.detach() for name, parameter in self.rule.named_parameters()}

    def start(self, generator: torch.Generator, unrolls: int) -> UnrollState:
        """Return ``unrolls`` fresh inner trainings."""
        parameters = [self.flatten(self.task.init_parameters(generator)) for _ in range(unrolls)]
        state = self.rule.init_state(self.layout, torch.zeros((), dtype=self.dtype))
        stacked = tuple(torch.stack(chunk) for chunk in zip(*parameters, strict=True))
        return UnrollState(stacked, _map(lambda t: t.expand(unrolls, *t.shape).clone(), state))

    def batches(self, generator: torch.Generator, steps: int, unrolls: int) -> Batch:
        """Return training batches (steps, unrolls, ...)."""
        return self.task.sample_batch(generator, (steps, unrolls))

    def averages(self, meta: Meta, state: UnrollState) -> tuple[Tensor, ...]:
        """Return the averages of each chunk's parameters (k, size), under meta-parameters as :meth:`run` takes them."""
        rule = _Averages(self.rule)
        meta = {f"rule.{name}": value for name, value in meta.items()}
        batched = next(iter(meta.values())).dim() > next(self.rule.parameters()).dim()

        def average(own: Meta, each: UnrollState) -> tuple[Tensor, ...]:
            return functional_call(rule, own, (each.parameters, each.rule, self.layout))

        return vmap(average, in_dims=(0 if batched else None, 0))(meta, state)

    def run(self, meta: Meta, state: UnrollState, batches: Batch) -> tuple[UnrollState, Tensor]:
        """Train for as many steps as there are batches (steps, k, ...); return the state and losses (steps, k).

        The loss of a step is the one before its update. Values are as they are: not clipped, perhaps not finite.
        """
        batched = next(iter(meta.values())).dim() > next(self.rule.parameters()).dim()
        fused = self.compiled and batched and not torch.is_grad_enabled()
        clock = RefreshClock(self.rule.nominal, state.rule)
        losses = []
        for batch in zip(*batches, strict=True):
            flags = clock.is_due, clock.follows
            step = partial(self.step, refresh=clock.is_due, follow=clock.follows)
            step = vmap(step, in_dims=(0 if batched else None, 0, 0))
            if fused:
                if flags not in self._fused:
                    self._fused[flags] = fuse(step, (meta, state, batch))
                step = self._fused[flags]
            state, loss = step(meta, state, batch)
            clock.advance()
            losses.append(loss)
        return state, torch.stack(losses)

    def step(
        self, meta: Meta, state: UnrollState, batch: Batch, refresh: bool = True, follow: bool = True
    ) -> tuple[UnrollState, Tensor]:
        """Take one inner step of one training; pure.

        Without ``refresh`` no basis of the nominal term is due, without ``follow`` the rule looks at no factors.
        """

        value, gradients, factors = self._differentiate(state.parameters, batch, follow)
        neurons = None
        if self.layout.spaces is not None and self.rule.config.reads_neurons:
            neurons = gather_neurons(factors, self.layout.spaces, self.rule.config.data_points)
        arguments = (state.parameters, gradients, state.rule, self.layout, neurons)
        options = {"factors": factors, "refresh": refresh, "follow": follow}
        updates, rule_state = functional_call(self.rule, meta, arguments, options)
        parameters = tuple(flat - update.step for flat, update in zip(state.parameters, updates, strict=True))
        return UnrollState(parameters, rule_state), value

    def _differentiate(
        self, parameters: tuple[Tensor, ...], batch: Batch, follow: bool
    ) -> tuple[Tensor, tuple[Tensor, ...], Mapping[str, DecomposedGradient]]:
        """Return the loss, its gradients and, where the rule looks at them, their factors."""

        def loss(flat: tuple[Tensor, ...]) -> Tensor:
            return self.task.loss(self.unflatten(flat), batch)

        if not follow:
            gradients, value = grad_and_value(loss)(parameters)
            return value, gradients, {}
        captured = capture_gradients(self.task.module, loss, parameters, self.plan)
        return captured.loss, captured.gradients, captured.factors

    def flatten(self, parameters: Parameters) -> tuple[Tensor, ...]:
        """Return named parameters as one flat tensor per chunk."""
        return tuple(chunk.flatten(parameters) for chunk in self.layout.chunks)

    def unflatten(self, flat: tuple[Tensor, ...]) -> Parameters:
        """Return flat chunks as named parameters."""
        named: Parameters = {}
        for chunk, values in zip(self.layout.chunks, flat, strict=True):
            named.update(chunk.unflatten(values))
        return named


class _Averages(nn.Module):
    """Calls :meth:`UpdateRule.averages`, since ``functional_call`` calls ``forward`` alone."""

    def __init__(self, rule: UpdateRule) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        """Return the averages."""
        return self.rule.averages(*arguments)


def infer_task_spaces(task: AbstractTask, parameters: Parameters, batch: Batch) -> NeuronSpaces | None:
    """Return the neuron spaces that one ordinary forward pass of the task shows, or None without layers."""
    with GradientCapture(task.module) as capture:
        # The capture takes a layer's slot for its parameter only if that is an nn.Parameter, not a plain tensor.
        tracked = {name: nn.Parameter(value.detach()) for name, value in parameters.items()}
        task.loss(tracked, batch)
        specs = {name: require_adapter(layer, name).spec(layer) for name, layer in capture.layers.items()}
        return infer_spaces(specs, capture.wiring()) if specs else None


def lay_out(task: AbstractTask, parameters: Parameters, spaces: NeuronSpaces | None, needs_factors: bool) -> Layout:
    """Return the layout of a task's parameters; those that the rule cannot learn for lack of factors stand apart."""
    owners = {}
    for ports in spaces.layers if spaces else ():
        module = task.module.get_submodule(ports.name)
        adapter = require_adapter(module, ports.name)
        for parameter, role in adapter.roles().items():
            form = (adapter.weight_order(module), ports.groups) if role == "weight" else ()
            owners[f"{ports.name}.{parameter}".lstrip(".")] = (ports.name, role, *form)
    learned, nominal = [], []
    for name, value in parameters.items():
        place = owners.get(name, (None, "other"))
        served = place[0] is not None or not needs_factors
        (learned if served else nominal).append(Segment(name, tuple(value.shape), *place))
    return Layout((*build_chunks(learned, True), *build_chunks(nominal, False)), spaces)


def _map(function: Callable[[Tensor], Tensor], tree: RuleState) -> RuleState:
    """Apply a function to every tensor of a state."""
    return torch.utils._pytree.tree_map(function, tree)
