"""A weight that lies otherwise in memory becomes the matrix of outputs and inputs, and goes back."""

import pytest
import torch

from gmn_optim.weight_order import WeightOrder

ORDERS = {
    "as it lies": (WeightOrder((3, 4), (0, 1)), (3, 4)),
    "inputs first": (WeightOrder((3, 4), (1, 0)), (3, 4)),
    "transposed convolution": (WeightOrder((1, 4, 3, 2, 2), (0, 2, 3, 4, 1)), (4, 3, 2, 2)),
    "transposed convolution in groups": (WeightOrder((2, 3, 4, 5), (0, 2, 3, 1)), (6, 4, 5)),
}


@pytest.mark.parametrize("name", ORDERS)
def test_elements_stand_in_the_order_of_a_loop_over_the_axes_of_the_matrix(name: str) -> None:
    order, shape = ORDERS[name]
    weight = torch.arange(torch.Size(shape).numel()).view(shape)
    places = torch.cartesian_prod(*(torch.arange(order.sizes[axis]) for axis in order.axes)).tolist()
    expected = []
    for place in places:
        by_axis = dict(zip(order.axes, place, strict=True))
        expected.append(weight.view(order.sizes)[tuple(by_axis[axis] for axis in range(len(order.sizes)))].item())
    assert order.arrange(weight).flatten().tolist() == expected


@pytest.mark.parametrize("name", ORDERS)
def test_restoring_undoes_arranging(name: str) -> None:
    order, shape = ORDERS[name]
    weight = torch.randn(shape)
    restored = order.restore(order.arrange(weight).flatten())
    assert restored.shape == order.sizes and torch.equal(restored.reshape(shape), weight)


@pytest.mark.parametrize("name", ORDERS)
def test_axes_behind_stay_behind(name: str) -> None:
    order, shape = ORDERS[name]
    weights = torch.randn(*shape, 6)
    flat = torch.stack([order.arrange(weight).flatten() for weight in weights.unbind(-1)], -1)
    assert torch.equal(order.restore(flat).reshape(*shape, 6), weights)


@pytest.mark.parametrize("name", ORDERS)
def test_both_ways_give_views(name: str) -> None:
    order, shape = ORDERS[name]
    weight, flat = torch.ones(shape), torch.ones(torch.Size(shape).numel())
    order.arrange(weight).zero_()
    order.restore(flat).zero_()
    assert not weight.any() and not flat.any()
