"""The eigenbasis body: a learned function of a matrix's coordinates in its bases."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gmn_optim.nn.gradmetanet import GradMetaNet, GradMetaNetConfig
from gmn_optim.rule.body import AbstractMatrixBody, MatrixChange, bodies
from gmn_optim.rule.coordinates import Coordinates
from gmn_optim.rule.eigen_features import COORDINATE_CHANNELS, LAYER_CHANNELS, coordinate_features, layer_features
from gmn_optim.rule.eigen_neurons import NEURON_CHANNELS, SET_CHANNELS, gather_eigen_neurons
from gmn_optim.rule.matrices import Matrix

OUTPUT_SPEED = 2.0
"""Outputs are multiplied by this, so that a perturbation in meta-training is felt."""


@bodies.register("eigenbasis")
class EigenbasisBody(AbstractMatrixBody):
    """Scales the nominal step of every coordinate, and adds a share of the gradient on the scale of its noise.

    For step u, gradient g, signal v and noise q of a coordinate it returns
    ``exp(2 tanh s) u + t g / (sqrt(v + q) + floor)``. ``(s, t)`` come from an MLP of one hidden layer that reads the
    coordinate, its layer and, with GradMetaNet, what that makes of the eigenvectors on either side: its product layer
    ``MLP([h_i, h_j, features])``. All that it reads is the same for either sign of an eigenvector, so a rule with this
    body is equivariant to rotations of the hidden bases in which layers write and read, not to permutations alone.
    Before any meta-training it returns u.

    Args:
        width: Hidden channels.
        gradmetanet: Sizes of the GradMetaNet that reads the eigen-neurons, or None.
        data_points: Rows that it reads.
        share: What the outputs are multiplied by, 1 as meta-trained.

    Reference:
        Gelberg et al. (2025), arXiv 2507.01649, section 4, for the product layer; George et al. (2018),
        arXiv 1806.03884, for the bases.

    Example:
        >>> body = EigenbasisBody(width=16, gradmetanet=None, data_points=32)
        >>> sum(parameter.numel() for parameter in body.parameters()), bool(body.output.weight.any())
        (242, False)
    """

    buffers_per_parameter = 2

    def __init__(self, width: int, gradmetanet: GradMetaNetConfig | None, data_points: int, share: float = 1.0) -> None:
        super().__init__()
        self.data_points, self.share = data_points, share
        self.from_coordinates = nn.Linear(COORDINATE_CHANNELS, width, bias=False)
        self.from_layer = nn.Linear(LAYER_CHANNELS, width)
        self.output = nn.Linear(width, 2)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        self.gradmetanet = None
        if gradmetanet is not None:
            # a number of its own would tell the place of an eigenvector in the basis, which is arbitrary
            sizes = replace(gradmetanet, neuron_numbers=False)
            self.gradmetanet = GradMetaNet(SET_CHANNELS, NEURON_CHANNELS, sizes)
            del self.gradmetanet.product
            self.from_inputs, self.from_outputs = (nn.Linear(gradmetanet.width, width, bias=False) for _ in range(2))

    def forward(
        self, turned: Sequence[Coordinates], parameters: Sequence[Tensor], matrices: Sequence[Matrix], alpha: Tensor
    ) -> list[MatrixChange]:
        """Return what is added to each step, as a share of it (groups, o, i), see :class:`AbstractMatrixBody`."""
        around = self._around(turned)
        return [
            MatrixChange(self._gain(each, layer_features(each, own, len(matrices)), sides), each.basis.memory)
            for each, own, sides in zip(turned, parameters, around, strict=True)
        ]

    def hold(self, turned: Sequence[Coordinates], matrices: Sequence[Matrix]) -> list[MatrixChange]:
        """Return the gains of the newest look."""
        return [MatrixChange(each.gain, each.basis.memory) for each in turned]

    def _around(self, turned: Sequence[Coordinates]) -> list["_Around | None"]:
        """Return what GradMetaNet makes of the eigenvectors on either side of each matrix."""
        if self.gradmetanet is None or not turned:
            return [None] * len(turned)
        neurons = gather_eigen_neurons([each.rows for each in turned if each.rows is not None], self.data_points)
        embedding = self.gradmetanet.embed(neurons.sets, neurons.spaces, neurons.neurons)
        return [
            _Around(self.from_inputs(inputs), self.from_outputs(outputs))
            for inputs, outputs in neurons.of_sides(embedding)
        ]

    def _gain(self, each: Coordinates, layer: Tensor, around: "_Around | None") -> Tensor:
        """Return the gain of one matrix."""
        # small terms are added up first, and sums are in place: the large tensor is written, not copied
        per_row = self.from_layer(layer)[:, None, None]
        hidden = self.from_coordinates(coordinate_features(each))
        if around is not None:
            per_row = per_row + around.outputs.unsqueeze(-2)
            hidden = hidden.add_(around.inputs.unsqueeze(-3))
        scale, share = (self.share * OUTPUT_SPEED * self.output(hidden.add_(per_row).relu_())).unbind(-1)
        both = each.squares if each.noise is None else each.squares + each.noise
        shrunk = (each.squares.sqrt() + each.floor) / (both.sqrt() + each.floor)
        return torch.expm1(2 * torch.tanh(scale)) + share * shrunk


class _Around(NamedTuple):
    """What the eigenvectors of inputs (groups, i, h) and of outputs (groups, o, h) add to the hidden channels."""

    inputs: Tensor
    outputs: Tensor
