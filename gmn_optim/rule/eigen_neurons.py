"""Eigen-neurons: the eigenvectors of each side of each matrix, as GradMetaNet reads them.

Each eigenvector is a neuron, which a data point excites by its coordinate along it. Features do not tell its sign.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gmn_optim.constants import constant
from gmn_optim.neuron_sets import choose_rows
from gmn_optim.neurons import LayerPorts, NeuronSpace, NeuronSpaces
from gmn_optim.rule.coordinates import TurnedRows
from gmn_optim.rule.features import TINY, root

SET_CHANNELS, NEURON_CHANNELS = 2, 2

LEAST_SHARE = 1e-7
"""Eigenvectors of a smaller share of their side's variance are taken for one of this: theirs is rounding error."""


class EigenNeurons(NamedTuple):
    """What GradMetaNet reads of all sides of all matrices, one behind the other: inputs, outputs, inputs, ...

    Attributes:
        sets: Size of a row's coordinate against the root mean square over the side, plain and as log(1 + size^2)
            (r, n, 2).
        neurons: Log of the share of the side's variance; mean against root mean square over all rows (n, 2).
        spaces: A space for each side.
    """

    sets: Tensor
    neurons: Tensor
    spaces: NeuronSpaces

    def of_sides(self, embedding: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the embedding (n, f) of each matrix's inputs (groups, i, f) and outputs (groups, o, f)."""
        sides = []
        for ports in self.spaces.layers:
            places = (self.spaces.place(ports.input_space), self.spaces.place(ports.output_space))
            inputs, outputs = (embedding[place].unflatten(0, (ports.groups, -1)) for place in places)
            sides.append((inputs, outputs))
        return sides


def gather_eigen_neurons(turned: Sequence[TurnedRows], rows: int) -> EigenNeurons:
    """Return the eigen-neurons of matrices, with ``rows`` rows chosen so that the order of data points is immaterial.

    Args:
        turned: Factors of each matrix in its bases, at least one.
        rows: Number r of rows for the sets, see :func:`gmn_optim.neuron_sets.choose_rows`.

    Example:
        >>> neurons = gather_eigen_neurons([TurnedRows(torch.randn(1, 7, 3), torch.randn(1, 7, 4))], rows=5)
        >>> neurons.sets.shape, neurons.neurons.shape, neurons.spaces.widths
        (torch.Size([5, 7, 2]), torch.Size([7, 2]), (3, 4))
    """
    flat = {str(number): tuple(side.movedim(0, 1).flatten(1) for side in each) for number, each in enumerate(turned)}
    chosen = choose_rows(flat, rows)
    sides = [_measure(side, chosen[name]) for name, both in flat.items() for side in both]
    shapes = tuple((each.activations.shape[0], each.activations.shape[2], each.backprops.shape[2]) for each in turned)
    sets, neurons = (torch.cat(parts, dim=-2) for parts in zip(*sides, strict=True))
    return EigenNeurons(sets, neurons, _spaces(shapes))


def _measure(side: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features of a side (R, n) over the chosen rows (r, n, 2), and of its neurons (n, 2)."""
    squares = side.square().mean(0)
    scale = root(squares.mean()).clamp_min(TINY)
    sizes = side[chosen].abs() / scale
    share = (squares / (scale * scale)).clamp_min(LEAST_SHARE).log()
    agreement = side.mean(0).abs() / torch.maximum(root(squares), scale * LEAST_SHARE**0.5)
    return torch.stack([sizes, sizes.square().log1p()], dim=-1), torch.stack([0.25 * share, 2 * agreement], dim=-1)


@constant()
def _spaces(shapes: tuple[tuple[int, int, int], ...]) -> NeuronSpaces:
    """Return the spaces of matrices of these groups, inputs and outputs."""
    spaces, layers = [], []
    for depth, (groups, inputs, outputs) in enumerate(shapes):
        spaces += [NeuronSpace(groups * inputs, "input", depth), NeuronSpace(groups * outputs, "output", depth)]
        layers.append(LayerPorts(str(depth), 2 * depth, 2 * depth + 1, groups))
    return NeuronSpaces(tuple(spaces), tuple(layers))
