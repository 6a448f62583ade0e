"""Permutations move what they may, and features as the permuted network would."""

import pytest
import torch

from gmn_optim.neurons import chain_spaces
from gmn_optim.nn import ProductLayer
from gmn_optim.testing import permute_neurons, permute_parameters, random_permutations
from tests import reference

SPACES = chain_spaces([4, 3, 2])


@pytest.mark.parametrize("seed", range(20))
def test_permutations_move_what_they_may_and_nothing_else(seed: int) -> None:
    spaces = chain_spaces([3, 2, 5, 1, 2])
    orders = random_permutations(spaces, torch.Generator().manual_seed(seed))
    for order, space in zip(orders, spaces.spaces, strict=True):
        assert sorted(order.tolist()) == list(range(space.width))
        moved = order.tolist() != list(range(space.width))
        assert moved == (space.kind == "hidden" and space.width > 1)
    everywhere = random_permutations(spaces, torch.Generator().manual_seed(seed), ("input", "output"))
    assert [order.tolist() == list(range(len(order))) for order in everywhere] == [False, True, True, True, False]


def test_permuted_neurons_and_parameters_are_those_of_a_permuted_network() -> None:
    torch.manual_seed(0)
    orders = random_permutations(SPACES, torch.Generator(), ("input", "hidden", "output"))
    layer, h = ProductLayer(2, 4, 3), torch.randn(5, SPACES.size, 2)
    moved = permute_neurons(h, SPACES, orders)
    for number, order in enumerate(orders):
        assert torch.equal(moved[:, SPACES.place(number)], h[:, SPACES.place(number)][:, order])
    before, after = (reference.product_layer(layer, each[0], SPACES) for each in (h, moved))
    for found, expected in zip(permute_parameters(before, SPACES, orders), after, strict=True):
        assert torch.equal(found.weight, expected.weight) and torch.equal(found.bias, expected.bias)
