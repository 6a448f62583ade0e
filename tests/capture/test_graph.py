"""Products with a parameter are found in the graph, and their rows are the parameter's gradient; all in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional

from gmn_optim.capture.graph import find_matrix_uses
from gmn_optim.capture.graph_rows import count_data_points
from tests.capture.products import close, factors_of, total, watch

# Claims of exactness are made in float64.
pytestmark = pytest.mark.usefixtures("seeded", "double_precision")


Function = Callable[[Tensor, Tensor, Tensor], Tensor]

# Functions of data (..., 3), weight (4, 3) and bias (4), with how a block of the weight is used.
WHOLE = (range(4), range(3))
USES: dict[str, tuple[Function, tuple[range, range], bool]] = {
    "linear": (lambda x, w, b: functional.linear(x, w), WHOLE, False),
    "linear with bias": (lambda x, w, b: functional.linear(x, w, b), WHOLE, False),
    "matmul T": (lambda x, w, b: x @ w.T, WHOLE, False),
    "matmul mT": (lambda x, w, b: torch.matmul(x, w.mT) + b, WHOLE, False),
    "transpose": (lambda x, w, b: x @ w.transpose(-1, -2).contiguous(), WHOLE, False),
    "einsum": (lambda x, w, b: torch.einsum("...i,oi->...o", x, w), WHOLE, False),
    "tensordot": (lambda x, w, b: torch.tensordot(x, w, ([-1], [1])), WHOLE, False),
    "inner": (lambda x, w, b: torch.inner(x, w), WHOLE, False),
    "slice of rows": (lambda x, w, b: functional.linear(x, w[1:3], b[1:3]), (range(1, 3), range(3)), False),
    "last rows": (lambda x, w, b: functional.linear(x, w[-2:]), (range(2, 4), range(3)), False),
    "slice of columns": (lambda x, w, b: functional.linear(x[..., :2], w[:, 1:]), (range(4), range(1, 3)), False),
    "narrow": (lambda x, w, b: x @ w.narrow(0, 1, 2).T, (range(1, 3), range(3)), False),
    "chunk": (lambda x, w, b: functional.linear(x, w.chunk(2)[1]), (range(2, 4), range(3)), False),
    "split": (lambda x, w, b: functional.linear(x, w.split([1, 3])[1]), (range(1, 4), range(3)), False),
    "unsafe split": (lambda x, w, b: functional.linear(x, w.unsafe_chunk(2)[1]), (range(2, 4), range(3)), False),
    "one row": (lambda x, w, b: x @ w[2].unsqueeze(1), (range(2, 3), range(3)), False),
    "unbound row": (lambda x, w, b: x @ w.unbind(0)[1].view(3, 1), (range(1, 2), range(3)), False),
    "untransposed": (lambda x, w, b: torch.cat([x, x[..., :1]], -1) @ w, WHOLE, True),
    "view and back": (lambda x, w, b: x @ w.view(2, 6).view(4, 3).squeeze().unsqueeze(0).squeeze(0).T, WHOLE, False),
}


@pytest.mark.parametrize("needs_gradient", [True, False])
@pytest.mark.parametrize("shape", [(3,), (5, 3), (5, 2, 3), (5, 2, 2, 3), (1, 3), (5, 1, 3)])
@pytest.mark.parametrize("name", USES)
def test_products_with_a_block_are_found_and_their_rows_are_its_gradient(
    name: str, shape: tuple[int, ...], needs_gradient: bool
) -> None:
    function, block, is_reversed = USES[name]
    weight, bias, x = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4)), torch.randn(shape)
    output = function(x.requires_grad_(needs_gradient), weight, bias)
    uses = find_matrix_uses([output], [weight])
    (use,) = uses.products
    assert not uses.sums and not uses.unknown
    assert (use.weight, (use.block.rows, use.block.columns), use.is_reversed) == (weight, block, is_reversed)
    assert count_data_points(use) == (shape[0] if len(shape) > 1 else 1)
    found = watch(uses)
    output.square().sum().backward()
    assert found[0][1][0].activations.shape == (x.numel() // 3, len(block[1]))
    close(total(found, weight), weight.grad)


# Functions of data (b, 2, 3), weight and bias, in each of which a data point keeps to itself.
PER_SAMPLE: dict[str, Function] = {
    name: function for name, (function, *_) in USES.items() if name not in ("one row", "unbound row")
} | {
    "flattened by hand": lambda x, w, b: functional.linear(x.flatten(0, -2), w, b).tanh(),
    "two uses": lambda x, w, b: functional.linear(functional.linear(x, w).tanh() @ w, w, b),
    "weight first": lambda x, w, b: torch.bmm(w.expand(x.shape[0], 4, 3), x.mT),
    "weight repeated": lambda x, w, b: torch.bmm(x, w.T.expand(x.shape[0], 3, 4)),
    "viewed otherwise": lambda x, w, b: torch.bmm(x, w.T.expand(x.shape[0], 3, 4)).view(2, 1, 4 * x.shape[0]),
    "with an addend": lambda x, w, b: torch.baddbmm(b.unsqueeze(0), x, w.T.expand(x.shape[0], 3, 4)),
}


@pytest.mark.parametrize("name", PER_SAMPLE)
def test_each_data_point_has_the_gradient_that_vmap_gives(name: str) -> None:
    weight, bias, x = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4)), torch.randn(5, 2, 3)
    function = PER_SAMPLE[name]
    output = function(x.requires_grad_(), weight, bias)
    uses = find_matrix_uses([output], [weight])
    assert uses.products and not uses.unknown
    found = watch(uses)
    output.square().sum().backward()
    each = [factors_of(use, rows[0]) for use, rows in found]
    assert all(factors.activations.shape[:2] == (5, 2) for factors in each)
    shares = sum(torch.einsum("bpo,bpi->boi", factors.backprops, factors.activations) for factors in each)
    close(
        shares,
        vmap(grad(lambda w, one: function(one[None], w, bias.detach()).square().sum()), (None, 0))(weight, x.detach()),
    )


def test_a_weight_in_front_of_data_in_columns_has_one_row_per_column() -> None:
    weight, x = nn.Parameter(torch.randn(4, 3)), torch.randn(3, 5)
    output = weight @ x
    uses = find_matrix_uses([output], [weight])
    assert [(use.operand, use.is_transposed, use.is_reversed, use.leading) for use in uses.products] == [
        (0, False, False, (5,))
    ]
    found = watch(uses)
    output.square().sum().backward()
    torch.testing.assert_close(found[0][1][0].activations, x.T)
    close(total(found, weight), weight.grad)


@pytest.mark.parametrize("function", [lambda w, x: w @ x, lambda w, x: torch.mv(w, x), lambda w, x: w @ x @ w])
def test_vectors_are_single_rows(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    weight = nn.Parameter(torch.randn(3, 3))
    output = function(weight, torch.randn(3))
    uses = find_matrix_uses([output], [weight])
    assert not uses.unknown
    found = watch(uses)
    output.square().sum().backward()
    close(total(found, weight), weight.grad)


def test_a_product_of_a_weight_with_itself_has_two_uses() -> None:
    weight = nn.Parameter(torch.randn(4, 3))
    output = weight @ weight.T
    found = watch(find_matrix_uses([output], [weight]))
    assert len(found) == 2
    output.square().sum().backward()
    close(total(found, weight), weight.grad)


@pytest.mark.parametrize("shape", [(4, 1), (1, 3), (1, 1)])
def test_weights_with_an_axis_of_size_one_are_read_the_right_way(shape: tuple[int, int]) -> None:
    weight = nn.Parameter(torch.randn(shape))
    output = functional.linear(torch.randn(5, shape[1]), weight) @ weight @ weight.T
    found = watch(find_matrix_uses([output], [weight]))
    assert len(found) == 3
    output.square().sum().backward()
    close(total(found, weight), weight.grad)


def test_a_convolution_kernel_may_be_flattened() -> None:
    weight, x = nn.Parameter(torch.randn(4, 2, 3, 3)), torch.randn(5, 18)
    output = functional.linear(x, weight.flatten(1))
    found = watch(find_matrix_uses([output], [weight]))
    output.square().sum().backward()
    close(total(found, weight), weight.grad)


def test_a_weight_that_is_not_contiguous_is_read_by_its_axes() -> None:
    weight = nn.Parameter(torch.randn(3, 4).mT)
    output = functional.linear(torch.randn(5, 2, 3), weight[1:])
    found = watch(find_matrix_uses([output], [weight]))
    assert found[0][0].block.rows == range(1, 4)
    output.square().sum().backward()
    close(total(found, weight), weight.grad)


def test_a_tied_head_is_found_beside_the_embedding() -> None:
    table, layer, tokens = nn.Embedding(9, 4), nn.Linear(4, 4), torch.randint(9, (5, 3))
    output = functional.linear(layer(table(tokens)), table.weight)
    uses = find_matrix_uses([output], [table.weight])
    assert [use.node.name() for use in uses.unknown] == ["EmbeddingBackward0"]
    found = watch(uses)
    output.square().sum().backward()
    looked_up = torch.zeros(9, 4).index_add_(0, tokens.flatten(), _input_gradient(table, layer, tokens).flatten(0, 1))
    close(total(found, table.weight) + looked_up, table.weight.grad)


def _input_gradient(table: nn.Embedding, layer: nn.Linear, tokens: Tensor) -> Tensor:
    """Return the gradient of what the embedding returns."""
    embedded = table(tokens).detach().requires_grad_()
    loss = functional.linear(layer(embedded), table.weight).square().sum()
    return torch.autograd.grad(loss, embedded)[0]


# Functions of data (5, 3) and weight (3, 3) whose gradient is no sum over rows that the graph shows.
UNKNOWN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "power": lambda x, w: w.square() + x.sum(),
    "scaled": lambda x, w: functional.linear(x, 2 * w),
    "summed": lambda x, w: x @ (w + w.T),
    "alpha": lambda x, w: torch.addmm(torch.zeros(3), x, w, alpha=2),
    "gathered rows": lambda x, w: x @ w[[0, 2, 1]],
    "every second row": lambda x, w: x @ w[::2].T,
    "reshaped": lambda x, w: x[:, :1] @ w.reshape(1, 9),
    "diagonal": lambda x, w: x * w.diagonal(),
    "copied in place": lambda x, w: x @ w.clone().mul_(2),
    "joined": lambda x, w: functional.linear(x, torch.cat([w, w])),
    "vector": lambda x, w: x @ w[0],
    "moved and cut": lambda x, w: x @ w.T.contiguous().view(9)[:3].view(3, 1),
    "heads": lambda x, w: torch.bmm(x.expand(3, 5, 3), w.view(3, 1, 3).mT),
    "repeated along a side": lambda x, w: x @ w[0].unsqueeze(1).expand(3, 2),
    "complex": lambda x, w: torch.view_as_real(x.to(torch.complex128) @ w.to(torch.complex128)),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_uses_are_reported_as_not_understood(name: str) -> None:
    weight = nn.Parameter(torch.randn(3, 3))
    uses = find_matrix_uses([UNKNOWN[name](torch.randn(5, 3), weight)], [weight])
    assert uses.unknown and not uses.products and not uses.sums
    assert all("not understood" in use.reason and use.node.name() in use.reason for use in uses.unknown)


def test_a_batch_of_different_weights_is_not_one_matrix() -> None:
    weight = nn.Parameter(torch.randn(2, 3, 3))
    uses = find_matrix_uses([torch.bmm(torch.randn(2, 5, 3), weight)], [weight])
    assert [use.node.name() for use in uses.unknown] == ["BmmBackward0"] and not uses.products


def test_a_use_that_is_understood_does_not_hide_one_that_is_not() -> None:
    weight, x = nn.Parameter(torch.randn(3, 3)), torch.randn(5, 3)
    output = functional.linear(x, weight)
    uses = find_matrix_uses([output, weight.square()], [weight])
    assert len(uses.products) == len(uses.unknown) == 1
    handed_out = find_matrix_uses([output, weight.T], [weight])
    assert len(handed_out.products) == 1 and [use.node for use in handed_out.unknown] == [None]
    assert find_matrix_uses([output, weight], [weight]).unknown[0].reason.endswith("an output")


def test_frozen_and_absent_weights_have_no_uses() -> None:
    frozen, absent = nn.Parameter(torch.randn(3, 3), requires_grad=False), nn.Parameter(torch.randn(3, 3))
    output = functional.linear(torch.randn(5, 3, requires_grad=True), frozen)
    assert find_matrix_uses([output, torch.ones(1)], [frozen, absent]) == ([], [], [])
    empty = nn.Parameter(torch.empty(0, 3))
    assert len(find_matrix_uses([functional.linear(output, empty)], [empty]).unknown) == 1


def test_the_search_stops_where_it_is_told() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    hidden = first(torch.randn(5, 3)).tanh()
    weights = [first.weight, second.weight]
    inside = find_matrix_uses([second(hidden)], weights, stop_at=[hidden, torch.ones(1)])
    assert [use.weight for use in inside.products] == [second.weight]
    assert find_matrix_uses([hidden], weights, stop_at=[hidden]) == ([], [], [])


def test_uses_by_known_nodes_are_left_out() -> None:
    weight, x = nn.Parameter(torch.randn(3, 3)), torch.randn(5, 3)
    known, other = functional.linear(x, weight), weight.exp()
    uses = find_matrix_uses([known, other, weight], [weight], is_known=lambda node: node is known.grad_fn)
    assert not uses.products and [use.node for use in uses.unknown] == [None, other.grad_fn]


@pytest.mark.parametrize("lead", [(), (5,), (5, 2)])
def test_biases_are_reported_with_their_elements(lead: tuple[int, ...]) -> None:
    bias, x = nn.Parameter(torch.randn(4)), torch.randn(*lead, 3)
    for output, elements in (
        (functional.linear(x, torch.randn(4, 3), bias), range(4)),
        (x @ torch.randn(3, 2) + bias[1:3], range(1, 3)),
        (functional.linear(x, torch.randn(2, 3), bias.split([1, 2, 1])[1]), range(1, 3)),
    ):
        uses = find_matrix_uses([output], [bias])
        assert [use.rows for use in uses.sums] == [elements] and not uses.unknown and not uses.products
        expected = torch.autograd.grad(output.square().sum(), bias)[0][elements.start : elements.stop]
        close((2 * output.detach()).reshape(-1, len(elements)).sum(0), expected)


def test_the_product_that_a_bias_is_added_to_is_told() -> None:
    weight, bias, x = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3)), torch.randn(5, 2, 3)
    added = [functional.linear(x, weight, bias), bias + functional.linear(x, weight), x.transpose(0, 1) @ weight + bias]
    for output in added:
        uses = find_matrix_uses([output], [weight, bias])
        assert uses.sums[0].product is uses.products[0].node
    apart = [functional.linear(x, weight).tanh() + bias, x + bias, bias + x.requires_grad_()]
    assert [find_matrix_uses([each], [bias]).sums[0].product for each in apart] == [None] * 3


@pytest.mark.parametrize(
    "function",
    [
        lambda x, b: x * b,
        lambda x, b: torch.add(x, b, alpha=2),
        lambda x, b: torch.addmm(b, x, torch.ones(3, 3), beta=2),
        lambda x, b: x + b.unsqueeze(1)[:1],
        lambda x, b: x[:2] + b.expand(2, 3),
        lambda x, b: x[:, :2] + b[::2],
        lambda x, b: x.T[:, :3] + b.view(3, 1),
    ],
)
def test_other_uses_of_a_bias_are_not_understood(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    bias = nn.Parameter(torch.randn(3))
    uses = find_matrix_uses([function(torch.randn(5, 3), bias)], [bias])
    assert len(uses.unknown) == 1 and not uses.sums and not uses.products


def test_the_search_takes_each_node_once_and_does_not_recurse() -> None:
    weight, x = nn.Parameter(torch.randn(3, 3)), torch.randn(3, requires_grad=True)
    for _ in range(5000):  # 2 ** 5000 ways lead through these
        x = x + x
    uses = find_matrix_uses([functional.linear(x, weight), x.tanh(), x], [weight])
    assert len(uses.products) == 1
