"""The learned term in the eigenbasis: which matrices it serves, and what guards their steps."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gmn_optim.constants import constant_tensor
from gmn_optim.rule.basis import Basis
from gmn_optim.rule.body import AbstractMatrixBody, MatrixChange
from gmn_optim.rule.bounded_steps import root_mean_squares
from gmn_optim.rule.coordinates import Coordinates
from gmn_optim.rule.features import lengths
from gmn_optim.rule.layout import Chunk, Layout
from gmn_optim.rule.matrices import Matrix
from gmn_optim.rule.nominal import ChangedStep
from gmn_optim.rule.small_weights import LEAST_SIZE, first_sizes
from gmn_optim.rule.training_constants import TrainingConstants


class EigenbasisSteps:
    """Changes the steps of one update, see :attr:`gmn_optim.rule.nominal.Surroundings.change`, and says which it kept.

    A matrix is served if its chunk is, factors explain its gradient, and one of its sides has a basis. Its nominal step
    stays where the learned one is not finite, or larger than allowed; all nominal steps stay in a model one of whose
    matrices has far smaller weights at first than those of meta-training.

    Args:
        body: Changes the steps.
        layout: Which parameters stand where.
        parameters: Flat parameters of each chunk (size).
        alpha: Step size ().
        limit: The largest step, as a share of the parameters' size (root mean squares).
        floor: Added to that size.
        least_size: Of a matrix at first, see :class:`gmn_optim.rule.RuleConfig`.
        constants: Of this training.
    """

    def __init__(
        self,
        body: AbstractMatrixBody,
        layout: Layout,
        parameters: Sequence[Tensor],
        alpha: Tensor,
        limit: float,
        floor: float,
        least_size: float = 0.0,
        constants: TrainingConstants | None = None,
    ) -> None:
        self.body, self.layout, self.alpha = body, layout, alpha
        self.constants = constants or TrainingConstants()
        self.limit, self.floor, self.least_size = limit, floor, least_size
        self.pieces = [list(flat.split(chunk.sizes)) for chunk, flat in zip(layout.chunks, parameters, strict=True)]
        self._is_known: Tensor | bool = True
        self._guarded: dict[tuple[int, int], Tensor] = {}

    def __call__(self, turned: Sequence[Coordinates], follow: bool = True) -> list[ChangedStep]:
        """Return the steps of all matrices, and the gains that made them.

        Args:
            turned: All matrices.
            follow: Whether the body looks anew; otherwise gains are those of its last look.
        """
        if not turned:
            return []
        matrices, bases = zip(*((each.matrix, each.basis) for each in turned), strict=True)
        self._is_known = self.constants.once("is_known", lambda: knows_weights(matrices, bases, self.least_size))
        changes = self._changes(turned, follow)
        learned = [number for number, each in enumerate(turned) if self._is_learned(each)]
        factors = self._guard([turned[n] for n in learned], [changes[n].gain for n in learned])
        by_number = dict(zip(learned, factors, strict=True))
        return [_changed(each.step, by_number.get(n), changes[n]) for n, each in enumerate(turned)]

    def _changes(self, turned: Sequence[Coordinates], follow: bool) -> list[MatrixChange]:
        """Return what the body makes of all matrices, nothing where the learned term does not serve."""
        serves = [self._serves(each, follow) for each in turned]
        served = [each for each, serve in zip(turned, serves, strict=True) if serve]
        found = iter(self._of_body(served, [each.matrix for each in turned], follow) if served else [])
        pairs = zip(turned, serves, strict=True)
        return [self._allowed(next(found)) if serve else self._nothing(each) for each, serve in pairs]

    def _of_body(self, served: Sequence[Coordinates], matrices: Sequence[Matrix], follow: bool) -> list[MatrixChange]:
        """Return what the body makes of the matrices that it serves."""
        if not follow:
            return self.body.hold(served, matrices)
        return self.body(served, [each.matrix.gather(self.pieces) for each in served], matrices, self.alpha)

    def _allowed(self, change: MatrixChange) -> MatrixChange:
        """Return a change, without gains that are kept for a model with weights smaller than those of meta-training."""
        if not change.gain.dim():  # the guard leaves that out
            return change
        return change._replace(gain=torch.where(self._is_known, change.gain, 0.0))

    def _nothing(self, each: Coordinates) -> MatrixChange:
        """Return what leaves a matrix to the nominal term."""
        return MatrixChange(each.step.new_zeros(()), torch.zeros_like(each.basis.memory))

    def guarded(self, number: int, chunk: Chunk, like: Tensor) -> Tensor:
        """Return whether the learned step was replaced, for each segment of chunk ``number`` (segments)."""
        none = torch.zeros((), dtype=torch.bool, device=like.device)
        return torch.stack([self._guarded.get((number, place), none) for place in range(len(chunk.segments))])

    def _is_learned(self, each: Coordinates) -> bool:
        """Return whether a matrix is one of those that the learned term may serve."""
        return self.layout.chunks[each.matrix.place.chunk].learned

    def _serves(self, each: Coordinates, follow: bool) -> bool:
        """Return whether the learned term serves a matrix, judged by its role between looks, where no rows are seen."""
        has_rows = each.rows is not None if follow else each.matrix.weight.role == "weight"
        return has_rows and each.matrix.has_basis and self._is_learned(each)

    def _guard(self, turned: Sequence[Coordinates], gains: Sequence[Tensor]) -> list[Tensor]:
        """Return what steps are multiplied by, 1 where that is too large, and remember where that is so."""
        if not turned:
            return []
        # of one gain for all coordinates
        together = None if any(gain.dim() for gain in gains) else torch.stack([*gains])
        changed = self.alpha * _changed_sizes(turned, gains if together is None else together)
        # which is false where a size is not a number
        fits = (changed <= self.limit * (self._sizes([each.matrix for each in turned]) + self.floor)) & self._is_known
        for each, guarded in zip(turned, (~fits).unbind(), strict=True):
            self._note(each.matrix, guarded)
        if together is not None:
            return [*(1 + torch.where(fits, together, 0.0)).unbind()]
        return [1 + torch.where(fit, gain, 0.0) for fit, gain in zip(fits.unbind(), gains, strict=True)]

    def _sizes(self, matrices: Sequence[Matrix]) -> Tensor:
        """Return the root mean square of the parameters of each matrix (n)."""
        found = lengths([[self.pieces[part.chunk][part.segment] for part in matrix.parts] for matrix in matrices])
        shares = tuple(matrix.size**-0.5 for matrix in matrices)
        return found * constant_tensor(shares, found.dtype, found.device)

    def _note(self, matrix: Matrix, guarded: Tensor) -> None:
        """Remember whether a matrix was guarded, for its weight and its bias."""
        self._guarded.update(dict.fromkeys(matrix.parts, guarded))


def knows_weights(matrices: Sequence[Matrix], bases: Sequence[Basis], least_size: float) -> Tensor:
    """Return whether every matrix of a model began with large enough weights, or with zeros ().

    Args:
        matrices: All matrices of the model.
        bases: Of each, with the size of its weight before the first step.
        least_size: Root mean square of the smallest weights, against those of torch's initialization.

    Example:
        >>> from gmn_optim.rule.basis import init_basis
        >>> from gmn_optim.rule.layout import Segment, build_chunks
        >>> layout = Layout(tuple(build_chunks([Segment("w", (2, 3), "0", "weight")], True)))
        >>> basis = init_basis(layout.matrices[0], torch.zeros(()))._replace(size=torch.tensor(0.1))
        >>> [knows_weights(layout.matrices, [basis], least).item() for least in (0.2, 0.5)]
        [True, False]
    """
    sizes = first_sizes(matrices, [basis.size for basis in bases])
    return ((sizes >= least_size) | (sizes < LEAST_SIZE)).all()


def _changed_sizes(turned: Sequence[Coordinates], gains: Sequence[Tensor] | Tensor) -> Tensor:
    """Return the root mean square of each step with its gain (n); of gains (n) no changed steps are needed."""
    if not isinstance(gains, Tensor):
        return root_mean_squares([each.step * (1 + gain) for each, gain in zip(turned, gains, strict=True)])
    known = [root_mean_squares([each.step])[0] if each.step_size is None else each.step_size for each in turned]
    return torch.stack(known) * (1 + gains).abs()


def _changed(step: Tensor, factor: Tensor | None, change: MatrixChange) -> ChangedStep:
    """Return a step times a factor, which is left to be done where it is one number."""
    if factor is None or factor.dim() == 0:
        return ChangedStep(step, factor, *change)
    return ChangedStep(step * factor, None, *change)
