"""Takes the steps of a rule between two looks, in place."""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gmn_optim.between_looks.held_matrices import (
    ActiveByName,
    HeldMatrix,
    HeldParameter,
    hold_matrices,
    hold_vectors,
    measure,
)
from gmn_optim.between_looks.nominal_steps import NominalStep, NominalSteps
from gmn_optim.between_looks.pacing import AveragingWeights, Lengths, bound_of, follow_cosine, held_gains
from gmn_optim.places import ActiveParameter
from gmn_optim.report import MeasuredChunk, StepLog, measure_chunk
from gmn_optim.rule import Layout, RuleState, UpdateRule
from gmn_optim.rule.controller import OF_TRAINING, Controller
from gmn_optim.rule.eigenbasis_steps import knows_weights
from gmn_optim.rule.layout import joined
from gmn_optim.rule.matrices import Part
from gmn_optim.rule.schedule_free import MISSED_BETA, KroneckerScheduleFreeTerm
from gmn_optim.rule.update import SIZE_FLOOR


class _Constants(NamedTuple):
    """What stays through a training, from the sizes that weights had before the first step.

    Attributes:
        nominal: Makes nominal steps.
        sharpness: Of the average.
        scales: What steps of each matrix are multiplied by.
        is_known: Whether the learned term knows weights of these sizes.
    """

    nominal: NominalSteps
    sharpness: float
    scales: tuple[float, ...]
    is_known: bool


class _Move(NamedTuple):
    """What is done to a parameter p and its average e for a nominal step u.

    That is ``p <- shrunk p - of_average e - of_step u`` and ``e <- kept (e + factor u)``.

    Attributes:
        held: The parameter.
        step: u, outputs first, in one shape or another.
        factor: How far u goes.
        weights: What e and u weigh.
        size: lr times step size.
        shrunk: What weight decay leaves.
    """

    held: HeldParameter
    step: Tensor
    factor: float
    weights: AveragingWeights
    size: float
    shrunk: float

    @property
    def of_average(self) -> float:
        """Return the weight of e in p."""
        return self.size * self.weights.of_average

    @property
    def of_step(self) -> float:
        """Return the weight of u in p."""
        return self.size * self.weights.of_step * self.factor

    def fits(self, dtype: torch.dtype) -> bool:
        """Return whether all numbers are finite in a dtype."""
        numbers = self.factor, self.shrunk, self.of_average, self.of_step
        return all(abs(number) <= torch.finfo(dtype).max for number in numbers)


class StepsBetweenLooks:
    """Takes the steps of a rule at which nothing is looked at: the rule's own up to rounding, in fewer operations.

    Between two looks bases and preconditioners stay as they are. Of a matrix such a step is a product for each side,
    and a few lengths and a cosine that say how far to go. On a CPU these cost nothing to read, and what the rule makes
    of them by operations on small tensors is a few lines of arithmetic (:mod:`gmn_optim.between_looks.pacing`).

    Args:
        rule: A rule that :meth:`serves` this layout.
        layout: Which parameters stand where.
        state: The rule's state, which is changed in place.
        guarded: Per chunk, counts of guarded steps (segments), or None where no learned term serves it.

    Example:
        >>> from gmn_optim.rule import RuleConfig
        >>> rule, layout = UpdateRule(RuleConfig(nominal="adam", body=None)), Layout(())
        >>> StepsBetweenLooks.serves(rule, layout, rule.init_state(layout))
        False
    """

    def __init__(self, rule: UpdateRule, layout: Layout, state: RuleState, guarded: Sequence[Tensor | None]) -> None:
        self._rule, self._layout, self._state, self._guarded = rule, layout, state, guarded
        term, self._body = rule.nominal, None if rule.config.body is None else rule.body
        self._alpha = rule.alpha().item()
        have = [term.has_preconditioners(matrix) and not matrix.weight.missed for matrix in layout.matrices]
        self._matrices, self._vectors = hold_matrices(layout, state, have), hold_vectors(layout, state)
        self._served = [number for number, each in enumerate(self._matrices) if self._is_served(each)]
        self._counters = [*(chunk.step for chunk in state.chunks), *(basis.age for basis in state.bases), state.step]

    @staticmethod
    def serves(rule: UpdateRule, layout: Layout, state: RuleState) -> bool:
        """Return whether steps of this rule on such parameters can be taken here.

        That needs a CPU, an averaged Kronecker term, at most a controller beside it, and parameters that have all taken
        the same steps with one momentum, matrices among them.
        """
        return (
            state.step.device.type == "cpu"
            and type(rule.nominal) is KroneckerScheduleFreeTerm
            and not rule.config.scheduled
            and (rule.config.body is None or type(rule.body) is Controller)
            and bool(layout.matrices)
            and len({chunk.clock for chunk in layout.chunks}) == 1
        )

    @cached_property
    def _constants(self) -> _Constants:
        """What stays, which is known from the first step on."""
        matrices, bases, term = self._layout.matrices, self._state.bases, self._rule.nominal
        turns = term.turns(matrices, bases)
        nominal = NominalSteps(term, turns)
        scales = torch.stack(term.scales(matrices, bases, turns)).tolist()
        is_known = self._body is None or bool(knows_weights(matrices, bases, self._rule.config.least_size))
        return _Constants(nominal, term.sharpness_of(turns).item(), tuple(scales), is_known)

    def take(self, active: ActiveByName, age: int, log: StepLog) -> bool:
        """Take a step and return True; or change nothing and return False, if the rule itself is to take it.

        It is where an lr is a tensor, a parameter is not of the dtype of the computation or lies across memory, or a
        length is not an ordinary number.

        Args:
            active: All parameters of the layout by name.
            age: Which step of the bases this is, not the first.
            log: Where measures of the step are kept, if anybody asks for them.
        """
        if not all(_is_plain(each, self._state.step.dtype) for each in active.values()):
            return False
        step_number = self._state.chunks[0].step.item() + 1
        nominal = self._constants.nominal
        steps = [nominal.of_matrix(each, active, step_number) for each in self._matrices]
        lengths = measure(self._matrices, [each.gradients for each in steps], [each.step for each in steps], active)
        if not all(each.is_ordinary for each in lengths):
            return False
        memories = self._memories(lengths, age)
        factors, guarded = self._factors(lengths, memories, age)
        vectors = nominal.of_vectors(self._vectors, active, step_number)
        moves = self._moves(active, steps, vectors, factors, step_number)
        if not all(move.fits(self._state.step.dtype) for move in moves):
            return False
        if log.is_read or not log.measured:
            log.measured = self._measured(moves, active)
        self._apply(moves, active)
        self._remember([*steps, *vectors], memories, guarded)
        return True

    def _is_served(self, each: HeldMatrix) -> bool:
        """Return whether the learned term serves a matrix."""
        return self._body is not None and each.learned and each.has_preconditioners and each.matrix.has_basis

    # ------------------------------------------------------------------ how far

    def _memories(self, lengths: Sequence[Lengths], age: int) -> list[list[float]]:
        """Return what the controller remembers of the matrices that it serves, after this step."""
        if not self._served:
            return []
        memories = torch.stack([self._matrices[number].basis.memory for number in self._served])
        found = memories[:, :OF_TRAINING].tolist()
        for memory, number in zip(found, self._served, strict=True):
            memory[1] = follow_cosine(memory[1], lengths[number], age)
        return found

    def _factors(
        self, lengths: Sequence[Lengths], memories: Sequence[Sequence[float]], age: int
    ) -> tuple[list[float], list[Part]]:
        """Return what the step of each matrix is multiplied by, and the parameters whose gain the guard takes away."""
        gains, factors, guarded = [0.0] * len(self._matrices), [], []
        if self._served:
            held = held_gains(self._body, memories, age, self._layout.matrices)
            for number, gain in zip(self._served, held, strict=True):
                gains[number] = gain
        numbers = zip(self._matrices, lengths, gains, self._constants.scales, strict=True)
        for each, own, gain, scale in numbers:
            bound, fits = self._bound(each, own, gain)
            factors.append(scale * bound * (1 + gain if fits else 1.0))
            guarded += [] if fits else each.matrix.parts
        return factors, guarded

    def _bound(self, each: HeldMatrix, lengths: Lengths, gain: float) -> tuple[float, bool]:
        """Return what bounds the step of a matrix, and whether the guard allows its gain."""
        size, weights = (length / math.sqrt(each.matrix.size) for length in (lengths.step, lengths.parameters))
        bound = bound_of(size) if each.has_preconditioners else 1.0
        if self._body is None or not each.learned:
            return bound, True
        largest = self._rule.config.guard * (weights + SIZE_FLOOR)
        return bound, self._constants.is_known and self._alpha * bound * size * abs(1 + gain) <= largest

    # ------------------------------------------------------------------ the step

    def _moves(
        self,
        active: ActiveByName,
        steps: Sequence[NominalStep],
        vectors: Sequence[NominalStep],
        factors: Sequence[float],
        step_number: float,
    ) -> list[_Move]:
        """Return what is done to each parameter."""
        weights = self._weights(next(iter(active.values())).group["momentum"], step_number)
        parts = [
            (held, part, factor)
            for each, made, factor in zip(self._matrices, steps, factors, strict=True)
            for held, part in zip(each.parameters, each.matrix.cut(made.step), strict=True)
        ]
        parts += [(held, made.step, 1.0) for held, made in zip(self._vectors, vectors, strict=True)]
        return [self._move(*part, active[part[0].segment.name].group, weights[part[0].missed]) for part in parts]

    def _weights(self, momentum: float | Tensor | None, step_number: float) -> dict[bool, AveragingWeights]:
        """Return what averages weigh where factors explain the gradient, and where they miss it."""
        usual = self._constants.nominal.beta if momentum is None else float(momentum)
        of_missed = max(usual, MISSED_BETA) if momentum is None else usual
        pairs = (False, usual), (True, of_missed)
        return {missed: AveragingWeights.at(step_number, beta, self._constants.sharpness) for missed, beta in pairs}

    def _move(self, held: HeldParameter, step: Tensor, factor: float, group: Any, weights: AveragingWeights) -> _Move:
        """Return what is done to one parameter."""
        size = group["lr"] * self._alpha
        return _Move(held, step, factor, weights, size, 1 - size * group["weight_decay"])

    def _measured(self, moves: Sequence[_Move], active: ActiveByName) -> list[MeasuredChunk]:
        """Return the measures of the coming step."""
        of_part = {move.held.part: move for move in moves}
        found = []
        for number, chunk in enumerate(self._layout.chunks):
            own = [of_part[Part(number, place)] for place in range(len(chunk.segments))]
            steps = [
                each.weights.of_average * each.held.average + each.weights.of_step * each.factor * each.step.reshape(-1)
                for each in own
            ]
            gradients = [each.held.gradient(active) for each in own]
            lrs = [active[segment.name].group["lr"] for segment in chunk.segments]
            found.append(measure_chunk(chunk, self._alpha * joined(steps), joined(gradients), lrs))
        return found

    def _apply(self, moves: Sequence[_Move], active: ActiveByName) -> None:
        """Change parameters and averages."""
        for move in moves:
            parameter, average = move.held.parameter(active), move.held.moved
            step = move.held.as_moved(move.step)
            if move.shrunk != 1.0:
                parameter.mul_(move.shrunk)
            parameter.sub_(average, alpha=move.of_average).sub_(step, alpha=move.of_step)
            average.add_(step, alpha=move.factor).mul_(move.weights.kept)

    def _remember(
        self, steps: Sequence[NominalStep], memories: Sequence[Sequence[float]], guarded: Sequence[Part]
    ) -> None:
        """Count the step and what was guarded, and keep second moments and cosines."""
        torch._foreach_add_(self._counters, 1)
        held = [*(each.parameters for each in self._matrices), *((each,) for each in self._vectors)]
        for parameters, made in zip(held, steps, strict=True):
            for parameter, second in zip(parameters, made.seconds, strict=False):  # there are none where they hold
                parameter.second.view(second.shape).copy_(second)
        for memory, number in zip(memories, self._served, strict=True):
            self._matrices[number].basis.memory[1] = memory[1]
        for number, each in enumerate(self._matrices):
            if number not in self._served and each.basis.memory.numel():
                each.basis.memory.zero_()
        for chunk, segment in guarded:
            counts = self._guarded[chunk]
            if counts is not None:
                counts[segment] += 1


def _is_plain(each: ActiveParameter, dtype: torch.dtype) -> bool:
    """Return whether a parameter can be changed in place by numbers of the host."""
    lr, parameter = each.group["lr"], each.parameter
    return not isinstance(lr, Tensor) and parameter.dtype == parameter.grad.dtype == dtype and parameter.is_contiguous()
