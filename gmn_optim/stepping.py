"""One step of the update rule on a torch optimizer's parameters: lay out, pack, read neurons, apply, unpack.

Layout and flat state are made once and stay as long as the same parameters take part in the steps in the same way.
"""

import copy
import operator
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gmn_optim.allocation import keep_freed_memory
from gmn_optim.averages import begin_shares, keep_shares
from gmn_optim.between_looks import StepsBetweenLooks
from gmn_optim.capture import GradientCapture, Verification
from gmn_optim.gradients import DecomposedGradient
from gmn_optim.neuron_sets import NeuronSets, gather_neurons
from gmn_optim.neurons import LayerWiring, NeuronSpaces
from gmn_optim.packing import overwrite_state, pack_state
from gmn_optim.places import ActiveParameter, spaces_of
from gmn_optim.report import StepLog, measure_chunk
from gmn_optim.rule import Chunk, Layout, RefreshClock, RuleConfig, RuleState, Segment, UpdateRule, build_chunks
from gmn_optim.rule.scalars import fix_scalars
from gmn_optim.rule.training_constants import TrainingConstants
from gmn_optim.rule.update import ChunkUpdate

StateByParameter = MutableMapping[Tensor, MutableMapping[str, Any]]

_Key = tuple[int, list[tuple[object, ...]]]


class _Plan(NamedTuple):
    """What stays as it is while the same parameters take part in the steps.

    Attributes:
        key: Wiring (by its identity) and parameters that it was made for.
        wiring: What was known of the layers' neurons.
        layout: Which parameters stand where.
        state: The rule's flat state.
        rule: The rule in the dtype and on the device of the computation.
        alpha: The rule's step size (), which weight decay is measured in.
        step_size: The same as a number of the host, None where it follows a schedule.
        entries: The values of the optimizer's state, views of the flat one.
        guarded: Per chunk, counts of guarded steps (segments), or None where no learned term serves it.
        clock: Says when the nominal term's bases are made anew.
        constants: What the rule found to stay as it is.
        between_looks: Takes steps between two looks; None where the rule takes them all.
    """

    key: _Key
    wiring: Mapping[str, LayerWiring]
    layout: Layout
    state: RuleState
    rule: UpdateRule
    alpha: Tensor
    step_size: float | None
    entries: list[Tensor]
    guarded: list[Tensor | None]
    clock: RefreshClock
    constants: TrainingConstants
    between_looks: StepsBetweenLooks | None


class Stepper:
    """Takes steps of a rule, and keeps between them what need not be made anew.

    Args:
        rule: The update rule; it stays as it is.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> weight.grad, group = torch.ones(2), {"lr": 0.5, "weight_decay": 0.0, "maximize": False, "momentum": None}
        >>> stepper = Stepper(UpdateRule(RuleConfig(nominal="momentum", body=None, alpha=1.0)))
        >>> with torch.no_grad():
        ...     stepper.step([ActiveParameter("w", weight, group, 0)], None, {}, {weight: {}}, StepLog())
        >>> weight.tolist()
        [0.949999988079071, 0.949999988079071]
    """

    def __init__(self, rule: UpdateRule) -> None:
        self._rule = rule
        self._converted: dict[tuple[torch.dtype, torch.device], UpdateRule] = {}
        self._plan: _Plan | None = None
        self._with_shares: _Plan | None = None

    @property
    def reads_factors(self) -> bool:
        """Whether the rule looks at factors at the coming step; as long as that is not known it may."""
        return self._rule.reads_factors and (self._plan is None or self._plan.clock.follows)

    def forget(self) -> None:
        """Pack the optimizer's state anew at the next step."""
        self._plan = self._with_shares = None

    def step_size(self, step: Tensor) -> float:
        """Return the rule's step size at a step ()."""
        return self._rule_like(step).step_size(step).item()

    def step(
        self,
        active: Sequence[ActiveParameter],
        capture: GradientCapture | None,
        verdicts: Mapping[str, Verification],
        state: StateByParameter,
        log: StepLog,
    ) -> None:
        """Compute the update of all active parameters, then change parameters and state.

        Args:
            active: At least one parameter.
            capture: Gives the factors, or None where the rule looks at none.
            verdicts: On each captured layer with a gradient.
            state: The optimizer's state.
            log: Where the step is counted.
        """
        plan = self._prepare(active, capture, state, log)
        try:
            if not _take_between_looks(plan, active, log):
                self._take_by_rule(plan, active, capture, verdicts, log)
            self._keep_shares(plan, active, state)
            plan.clock.advance()
            log.steps += 1
        except BaseException:  # what the rule found to stay would outlive a step that never was
            self.forget()
            raise

    def _keep_shares(self, plan: _Plan, active: Sequence[ActiveParameter], state: StateByParameter) -> None:
        """Note what averages weigh after the first step of a plan: it stays, and is known by then."""
        if self._with_shares is not plan:
            keep_shares(plan.rule, plan.layout, plan.state, {each.name: state[each.parameter] for each in active})
            self._with_shares = plan

    def _take_by_rule(
        self,
        plan: _Plan,
        active: Sequence[ActiveParameter],
        capture: GradientCapture | None,
        verdicts: Mapping[str, Verification],
        log: StepLog,
    ) -> None:
        """Let the rule take a step, with the factors that it reads if it looks at any now."""
        sees, factors = not _let_go_by(capture), {}
        if capture is not None and plan.clock.follows and sees:
            factors = self._explained_factors(capture, active, plan.state.step, verdicts)
        _take(plan, active, factors, _neurons(factors, plan, active, verdicts), sees, log)

    def _explained_factors(
        self,
        capture: GradientCapture,
        active: Sequence[ActiveParameter],
        like: Tensor,
        verdicts: Mapping[str, Verification],
    ) -> dict[str, DecomposedGradient]:
        """Return the factors that the rule reads, of which a body in the eigenbasis asks how large squares are."""
        if not self._rule.config.in_eigenbasis:
            return _explained_factors(capture.gradients(), active, like)
        return _on_gradient_scale(_explained_factors(capture.gradients(for_squares=True), active, like), verdicts)

    def _prepare(
        self,
        active: Sequence[ActiveParameter],
        capture: GradientCapture | None,
        state: StateByParameter,
        log: StepLog,
    ) -> _Plan:
        """Return the plan of these parameters; that of the step before if nothing changed."""
        wiring = {} if capture is None else capture.wiring()
        key = (id(wiring), [(e.name, e.place, e.parameter.dtype, _own_group(e)) for e in active])
        if self._plan is None or self._plan.key != key or not _shows(state, active, self._plan.entries):
            layout = Layout(
                tuple(_chunks(active, state, self._rule.config)), _spaces(active, capture, self._rule.config)
            )
            self._plan = self._pack(key, wiring, layout, active, state, log)
        return self._plan

    def _pack(
        self,
        key: _Key,
        wiring: Mapping[str, LayerWiring],
        layout: Layout,
        active: Sequence[ActiveParameter],
        state: StateByParameter,
        log: StepLog,
    ) -> _Plan:
        """Return a plan with flat tensors, of which the optimizer's state and the log hold views from now on."""
        doubles = any(each.parameter.dtype == torch.float64 for each in active)
        like = torch.zeros((), dtype=torch.float64 if doubles else torch.float32, device=active[0].parameter.device)
        rule = self._rule_like(like)
        keep_freed_memory()
        _take_apart(state, active)
        by_name = {each.name: state[each.parameter] for each in active}
        packed = pack_state(rule, layout, by_name, like)
        begin_shares(rule, layout, by_name, like)
        clock = RefreshClock(rule.nominal, packed)
        guarded = [log.guard_counts(chunk, like.device) if chunk.learned else None for chunk in layout.chunks]
        log.measured = []  # of other parameters
        entries, constants = _entries(state, active), TrainingConstants()
        alpha = rule.alpha()
        step_size = None if rule.config.scheduled else alpha.item()
        between = None
        if StepsBetweenLooks.serves(rule, layout, packed):
            between = StepsBetweenLooks(rule, layout, packed, guarded)
        return _Plan(key, wiring, layout, packed, rule, alpha, step_size, entries, guarded, clock, constants, between)

    def _rule_like(self, like: Tensor) -> UpdateRule:
        """Return the rule with the dtype and device of a computation."""
        key = (like.dtype, like.device)
        if key not in self._converted:
            self._converted[key] = fix_scalars(copy.deepcopy(self._rule).to(like).requires_grad_(False))
        return self._converted[key]


# ---------------------------------------------------------------------- the plan


def _own_group(each: ActiveParameter) -> int | None:
    """Return the number of a group with a momentum of its own, which shares no chunk with others, else None."""
    return None if each.group["momentum"] is None else each.group_number


def _take_apart(state: StateByParameter, active: Sequence[ActiveParameter]) -> None:
    """Give parameters that take no part an own copy of their state: a view would keep all of the old flat tensors."""
    taking_part = {id(each.parameter) for each in active}
    for parameter, entries in state.items():
        if isinstance(parameter, Tensor) and id(parameter) not in taking_part:  # a user may keep other things there
            entries.update({name: value.clone() for name, value in entries.items() if isinstance(value, Tensor)})


def _entries(state: StateByParameter, active: Sequence[ActiveParameter]) -> list[Tensor]:
    """Return all entries of the state of these parameters."""
    return [value for each in active for value in state[each.parameter].values()]


def _shows(state: StateByParameter, active: Sequence[ActiveParameter], views: Sequence[Tensor]) -> bool:
    """Return whether the state still holds the views of the flat tensors, not what a user put there."""
    entries = _entries(state, active)
    return len(entries) == len(views) and all(map(operator.is_, entries, views))


def _chunks(active: Sequence[ActiveParameter], state: StateByParameter, config: RuleConfig) -> list[Chunk]:
    """Return chunks of parameters with the same steps taken, learned or not, missed or not, of one momentum."""
    needs_factors = config.needs_factors
    bundles: dict[tuple[Any, ...], list[Segment]] = {}
    clocks: dict[tuple[Any, ...], int] = {}
    for each in active:
        learned = config.body is not None and (each.place.explained or not needs_factors)
        layer, role, order, groups, _, missed = each.place
        segment = Segment(each.name, tuple(each.parameter.shape), layer, role, order, groups, missed)
        taken = float(state[each.parameter].get("step", 0.0))
        clock = clocks.setdefault((taken, _own_group(each)), len(clocks))
        bundles.setdefault((learned, clock, missed), []).append(segment)
    return [chunk for (learned, clock, _), parts in bundles.items() for chunk in build_chunks(parts, learned, clock)]


def _spaces(
    active: Sequence[ActiveParameter], capture: GradientCapture | None, config: RuleConfig
) -> NeuronSpaces | None:
    """Return the neuron spaces of the layers that take part, where the rule looks at neurons."""
    if capture is None or not config.reads_neurons:
        return None
    return spaces_of(capture, {each.place.layer for each in active if each.place.explained})


# ---------------------------------------------------------------------- the step


def _let_go_by(capture: GradientCapture | None) -> bool:
    """Return whether a capture let the passes of this step go by, whose factors nobody knows then."""
    return capture is not None and not capture.closed and not capture.enabled


def _explained_factors(
    captured: Mapping[str, DecomposedGradient], active: Sequence[ActiveParameter], like: Tensor
) -> dict[str, DecomposedGradient]:
    """Return the captured factors of the layers whose gradient they explain, up to a scale."""
    names = dict.fromkeys(each.place.layer for each in active if each.place.explained)
    return {
        name: DecomposedGradient(*(part.to(like) if part.is_floating_point() else part for part in captured[name]))
        for name in names
    }


def _on_gradient_scale(
    factors: Mapping[str, DecomposedGradient], verdicts: Mapping[str, Verification]
) -> dict[str, DecomposedGradient]:
    """Return factors on the scale of the gradients, which clipping or a scaled loss may have changed since."""
    scales = {name: verdicts[name].scale or 1.0 for name in factors}  # 0 where there is nothing to compare
    return {name: DecomposedGradient(a, g * scales[name]) for name, (a, g) in factors.items()}


def _neurons(
    factors: Mapping[str, DecomposedGradient],
    plan: _Plan,
    active: Sequence[ActiveParameter],
    verdicts: Mapping[str, Verification],
) -> NeuronSets | None:
    """Return the features of the neurons, on the scale of the gradients, or None where the rule has no use for them."""
    if plan.layout.spaces is None:
        return None
    signs = {each.place.layer: -1.0 if each.group["maximize"] else 1.0 for each in active}
    scaled = {
        name: DecomposedGradient(activations, backprops * (verdicts[name].scale * signs[name]))
        for name, (activations, backprops) in factors.items()
    }
    return gather_neurons(scaled, plan.layout.spaces, plan.rule.config.data_points)


def _take(
    plan: _Plan,
    active: Sequence[ActiveParameter],
    factors: Mapping[str, DecomposedGradient],
    neurons: NeuronSets | None,
    sees: bool,
    log: StepLog,
) -> None:
    """Compute the updates, apply them and remember the new state."""
    chunks, like = plan.layout.chunks, plan.state.step
    by_name = {each.name: each for each in active}
    parameters = _flatten(chunks, {name: each.parameter for name, each in by_name.items()}, like)
    gradients = _flatten(chunks, {name: _descended(each) for name, each in by_name.items()}, like)
    momenta = [_momentum(by_name[chunk.segments[0].name].group, like) for chunk in chunks]
    inputs = parameters, gradients, plan.state, plan.layout, neurons, momenta, factors
    when = {"refresh": plan.clock.is_due, "follow": plan.clock.follows, "sees": sees, "age": plan.clock.age}
    updates, state = plan.rule(*inputs, **when, constants=plan.constants)
    _apply_updates(plan, updates, by_name)
    if log.is_read or plan.clock.follows or not log.measured:
        lrs = [[by_name[segment.name].group["lr"] for segment in chunk.segments] for chunk in chunks]
        log.measured = [
            measure_chunk(chunk, update.step, gradient, own)
            for chunk, update, gradient, own in zip(chunks, updates, gradients, lrs, strict=True)
        ]
    overwrite_state(plan.state, state)


def _take_between_looks(plan: _Plan, active: Sequence[ActiveParameter], log: StepLog) -> bool:
    """Take a step at which nothing is looked at in few operations, and return whether that was possible."""
    age = plan.clock.age
    if plan.between_looks is None or plan.clock.follows or age is None:
        return False
    return plan.between_looks.take({each.name: each for each in active}, age, log)


def _flatten(chunks: Sequence[Chunk], tensors: Mapping[str, Tensor], like: Tensor) -> tuple[Tensor, ...]:
    """Return the flat tensor of each chunk, with the dtype and device of the computation."""
    return tuple(chunk.flatten(tensors).to(like) for chunk in chunks)


def _descended(each: ActiveParameter) -> Tensor:
    """Return the gradient of what is made smaller."""
    return -each.parameter.grad if each.group["maximize"] else each.parameter.grad


def _momentum(group: Mapping[str, Any], like: Tensor) -> Tensor | None:
    """Return a group's momentum as a tensor, or None."""
    momentum = group["momentum"]
    return None if momentum is None else torch.as_tensor(momentum, dtype=like.dtype, device=like.device)


def _apply_updates(plan: _Plan, updates: Sequence[ChunkUpdate], by_name: Mapping[str, ActiveParameter]) -> None:
    """Change all parameters, and count guarded steps without waiting for the device."""
    plain: dict[float, list[tuple[Tensor, Tensor]]] = {}
    for chunk, update, guarded in zip(plan.layout.chunks, updates, plan.guarded, strict=True):
        flat, size = _direction_and_size(plan, update)
        for name, direction in chunk.unflatten(flat).items():
            parameter, group = by_name[name].parameter, by_name[name].group
            if isinstance(group["lr"], Tensor) or group["weight_decay"] or parameter.dtype != direction.dtype:
                _apply(parameter, size * direction, group, plan.alpha)
            else:
                plain.setdefault(size * group["lr"], []).append((parameter, direction))
        if guarded is not None:
            guarded.add_(update.guarded)
    for lr, pairs in plain.items():
        torch._foreach_sub_(*map(list, zip(*pairs, strict=True)), alpha=lr)


def _direction_and_size(plan: _Plan, update: ChunkUpdate) -> tuple[Tensor, float]:
    """Return a flat tensor and a number of the host, whose product is a chunk's step."""
    if update.step_size is None or plan.step_size is None:
        return update.step, 1.0
    return update.direction, plan.step_size


def _apply(parameter: Tensor, step: Tensor, group: Mapping[str, Any], alpha: Tensor) -> None:
    """Change one parameter."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        lr = lr.to(step).reshape(())
    if group["weight_decay"]:
        parameter.mul_(1 - lr * alpha * group["weight_decay"])
    if isinstance(lr, Tensor):
        parameter.sub_((step * lr).to(parameter.dtype))
    else:
        parameter.sub_(step.to(parameter.dtype), alpha=lr)
