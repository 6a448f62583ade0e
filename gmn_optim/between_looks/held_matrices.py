"""What a step between two looks works on: matrices and vectors as views of the flat state."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gmn_optim.between_looks.pacing import Lengths
from gmn_optim.places import ActiveParameter
from gmn_optim.rule import Layout, RuleState, Segment
from gmn_optim.rule.basis import Basis
from gmn_optim.rule.matrices import Matrix, Part

ActiveByName = Mapping[str, ActiveParameter]


class HeldParameter(NamedTuple):
    """A parameter and what the state has of it.

    Attributes:
        segment: Its place in the layout.
        part: The numbers of chunk and segment.
        average: The nominal term's average (size).
        second: Second moment (size).
        moved: The average again, in the shape in which parameters are moved: of a matrix's weight (groups, o, inputs)
            without the column of the bias, of that bias (groups, o), of a weight that lies in memory otherwise its
            sizes there, of a vector (size).
        missed: Whether no factors explain the gradients of its chunk.
    """

    segment: Segment
    part: Part
    average: Tensor
    second: Tensor
    moved: Tensor
    missed: bool

    def gradient(self, active: ActiveByName) -> Tensor:
        """Return the gradient of what is made smaller, outputs first (size)."""
        each = active[self.segment.name]
        flat = self.segment.flatten(each.parameter.grad)
        return -flat if each.group["maximize"] else flat

    def parameter(self, active: ActiveByName) -> Tensor:
        """Return a view of the parameter in the shape in which it is moved."""
        return active[self.segment.name].parameter.view(self.moved.shape)

    def as_moved(self, step: Tensor) -> Tensor:
        """Return a step, outputs first, in the shape in which parameters are moved."""
        return step if self.segment.order is None else self.segment.unflatten(step.reshape(-1))


class HeldMatrix(NamedTuple):
    """A matrix whose basis holds.

    Attributes:
        matrix: The matrix.
        basis: Its part of the state.
        parameters: Weight and, if there is one, bias.
        learned: Whether the learned term may serve it, so that its steps are guarded.
        has_preconditioners: Whether these make its steps.
    """

    matrix: Matrix
    basis: Basis
    parameters: tuple[HeldParameter, ...]
    learned: bool
    has_preconditioners: bool


def hold_matrices(layout: Layout, state: RuleState, have_preconditioners: Sequence[bool]) -> list[HeldMatrix]:
    """Return all matrices, with views of the state.

    Args:
        layout: Which parameters stand where.
        state: The rule's state.
        have_preconditioners: Of each matrix, whether these make its steps.

    Example:
        >>> from gmn_optim.rule import RuleConfig, UpdateRule, build_chunks
        >>> layout = Layout(tuple(build_chunks([Segment("w", (2, 3), "0", "weight")], True)))
        >>> state = UpdateRule(RuleConfig(nominal="kronecker_schedule_free", body=None)).init_state(layout)
        >>> [each.parameters[0].moved.shape for each in hold_matrices(layout, state, [True])]
        [torch.Size([1, 2, 3])]
    """
    found = []
    for matrix, basis, have in zip(layout.matrices, state.bases, have_preconditioners, strict=True):
        shapes = (matrix.groups, matrix.rows, -1), (matrix.groups, matrix.rows)
        parameters = tuple(_hold(layout, state, *each) for each in zip(matrix.parts, shapes, strict=False))
        found.append(HeldMatrix(matrix, basis, parameters, layout.chunks[matrix.place.chunk].learned, have))
    return found


def hold_vectors(layout: Layout, state: RuleState) -> list[HeldParameter]:
    """Return the parameters that are in no matrix, with views of the state.

    Example:
        >>> from gmn_optim.rule import RuleConfig, UpdateRule, build_chunks
        >>> layout = Layout(tuple(build_chunks([Segment("b", (2,), "0", "scale")], True)))
        >>> state = UpdateRule(RuleConfig(nominal="kronecker_schedule_free", body=None)).init_state(layout)
        >>> [each.moved.shape for each in hold_vectors(layout, state)]
        [torch.Size([2])]
    """
    return [_hold(layout, state, part, (-1,)) for parts in layout.vectors for part in parts]


def measure(
    matrices: Sequence[HeldMatrix],
    gradients: Sequence[Sequence[Tensor]],
    steps: Sequence[Tensor],
    active: ActiveByName,
) -> list[Lengths]:
    """Return what is measured of each matrix, with one transfer.

    Args:
        matrices: The matrices.
        gradients: Of weight and bias of each (size).
        steps: Of each (groups, o, i).
        active: The parameters by name.
    """
    tensors, products = [], []
    for each, own, step in zip(matrices, gradients, steps, strict=True):
        averages = [held.average for held in each.parameters]
        tensors += [step, *own, *averages, *(active[held.segment.name].parameter for held in each.parameters)]
        products += [torch.dot(one, other) for one, other in zip(own, averages, strict=True)]
    numbers = torch.stack([*torch._foreach_norm(tensors), *products]).tolist()
    lengths, inner = iter(numbers[: len(tensors)]), iter(numbers[len(tensors) :])
    return [_lengths(lengths, inner, len(each.parameters)) for each in matrices]


def _lengths(lengths: Iterator[float], products: Iterator[float], parts: int) -> Lengths:
    """Return what is measured of a matrix in so many parts."""
    step = next(lengths)
    gradient, average, parameters = (math.hypot(*(next(lengths) for _ in range(parts))) for _ in range(3))
    return Lengths(step, gradient, average, parameters, sum(next(products) for _ in range(parts)))


def _hold(layout: Layout, state: RuleState, part: Part, shape: tuple[int, ...]) -> HeldParameter:
    """Return a parameter with views of its part of the state."""
    chunk, (average, second) = layout.chunks[part.chunk], state.chunks[part.chunk].nominal
    segment, start = chunk.segments[part.segment], sum(chunk.sizes[: part.segment])
    flat, squares = (each.narrow(0, start, segment.size) for each in (average, second))
    moved = flat.view(shape) if segment.order is None else segment.unflatten(flat)
    return HeldParameter(segment, part, flat, squares, moved, chunk.missed)
