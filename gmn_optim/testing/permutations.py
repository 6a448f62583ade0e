"""Permutations of a network's neurons, and what they do to features."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from gmn_optim.neurons import NeuronSpaces
from gmn_optim.nn.product import LayerFeatures

Permutations = tuple[Tensor, ...]
"""For every space the old places of its neurons in their new order (width)."""


def random_permutations(
    spaces: NeuronSpaces, generator: torch.Generator, kinds: Collection[str] = ("hidden",)
) -> Permutations:
    """Return a permutation for every space: none is the identity where ``kinds`` has the space and it has two neurons.

    Args:
        spaces: The network's neuron spaces.
        generator: Source of randomness.
        kinds: Kinds of spaces to permute; other spaces stay as they are.

    Example:
        >>> from gmn_optim.neurons import chain_spaces
        >>> [p.tolist() for p in random_permutations(chain_spaces([3, 2, 1]), torch.Generator())]
        [[0, 1, 2], [1, 0], [0]]
    """
    return tuple(
        random_order(space.width, generator) if space.kind in kinds else torch.arange(space.width)
        for space in spaces.spaces
    )


def permute_neurons(features: Tensor, spaces: NeuronSpaces, permutations: Permutations) -> Tensor:
    """Return features of neurons (..., n, c) with the neurons of each space in a new order.

    Example:
        >>> from gmn_optim.neurons import chain_spaces
        >>> spaces = chain_spaces([1, 3, 1])
        >>> order = (torch.tensor([0]), torch.tensor([2, 0, 1]), torch.tensor([0]))
        >>> permute_neurons(torch.arange(5).unsqueeze(-1), spaces, order).flatten().tolist()
        [0, 3, 1, 2, 4]
    """
    places = [spaces.place(number).start + order for number, order in enumerate(permutations)]
    return features.index_select(-2, torch.cat(places).to(features.device))


def permute_parameters(
    features: Sequence[LayerFeatures], spaces: NeuronSpaces, permutations: Permutations
) -> list[LayerFeatures]:
    """Return features of parameters after their neurons took a new order: rows and columns of weights move.

    Args:
        features: Per layer of ``spaces``, features of its weight (o, i, c) and bias (o, c).
        spaces: The network's neuron spaces.
        permutations: Per space, as :func:`random_permutations` makes them.

    Example:
        >>> from gmn_optim.neurons import chain_spaces
        >>> spaces = chain_spaces([1, 2, 1])
        >>> features = [LayerFeatures(torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[3.0], [4.0]])),
        ...             LayerFeatures(torch.tensor([[[5.0], [6.0]]]), torch.tensor([[7.0]]))]
        >>> order = (torch.tensor([0]), torch.tensor([1, 0]), torch.tensor([0]))
        >>> [layer.weight.flatten().tolist() for layer in permute_parameters(features, spaces, order)]
        [[2.0, 1.0], [6.0, 5.0]]
    """
    permuted = []
    for layer, ports in zip(features, spaces.layers, strict=True):
        rows, columns = permutations[ports.output_space], permutations[ports.input_space]
        permuted.append(LayerFeatures(layer.weight[rows][:, columns], layer.bias[rows]))
    return permuted


def random_order(size: int, generator: torch.Generator) -> Tensor:
    """Return a random permutation (size) that is not the identity, where there is one."""
    order = torch.randperm(size, generator=generator)
    return order.roll(1) if torch.equal(order, torch.arange(size)) else order
