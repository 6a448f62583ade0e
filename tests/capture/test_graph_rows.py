"""Rows come at every backward pass that wants them, in any dtype, and hooks keep nothing alive."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from gmn_optim.capture.graph import find_matrix_uses
from gmn_optim.capture.graph_rows import Rows, fold_rows, hook_rows
from tests.capture.products import close, total, watch

# Claims of exactness are made in float64.
pytestmark = pytest.mark.usefixtures("seeded", "double_precision")


@pytest.mark.filterwarnings("ignore:.*verriding a previously registered kernel")
def test_a_linear_kernel_that_is_one_node_is_understood() -> None:
    library = torch.library.Library("aten", "IMPL")
    library.impl("linear", _linear_kernel, "CPU")
    library.impl("linear_backward", _linear_backward_kernel, "CPU")
    try:
        weight, bias, x = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4)), torch.randn(5, 2, 3)
        output = functional.linear(x, weight, bias)
        uses = find_matrix_uses([output], [weight, bias])
        found = watch(uses)
        output.square().sum().backward()
    finally:
        library._destroy()
    (use,) = uses.products
    assert (use.node.name(), use.is_transposed, use.is_reversed) == ("LinearBackward0", False, False)
    assert use.leading == (5, 2) and len(uses.sums) == 1 and not uses.unknown
    close(total(found, weight), weight.grad)


def _linear_kernel(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Stand in for a device's own kernel."""
    return (x.flatten(0, -2).mm(weight.t()) + bias).view(*x.shape[:-1], -1)


def _linear_backward_kernel(x: Tensor, gradient: Tensor, weight: Tensor, mask: list[bool]) -> tuple[Tensor, ...]:
    """Stand in for that kernel's derivative."""
    rows = gradient.flatten(0, -2)
    return gradient @ weight, rows.t().mm(x.flatten(0, -2)), rows.sum(0)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_not_understood(layout: torch.layout) -> None:
    weight = nn.Parameter(torch.randn(4, 3))
    nested = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=layout)
    uses = find_matrix_uses([functional.linear(nested, weight)], [weight])
    assert len(uses.unknown) == 1 and not uses.products


@pytest.mark.parametrize("bias", [True, False])
def test_autocast_leaves_rows_in_its_dtype(bias: bool) -> None:
    layer, x = nn.Linear(3, 4, bias=bias).float(), torch.randn(5, 2, 3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = functional.linear(x, layer.weight, layer.bias) + x @ layer.weight.T
    uses = find_matrix_uses([output], [layer.weight])
    assert len(uses.products) == 2 and not uses.unknown
    found = watch(uses)
    output.float().square().sum().backward()
    assert {rows[0].backprops.dtype for _, rows in found} == {torch.bfloat16}
    torch.testing.assert_close(total(found, layer.weight).float(), layer.weight.grad, rtol=5e-2, atol=5e-2)


def test_a_retained_graph_leaves_its_rows_at_every_pass() -> None:
    weight = nn.Parameter(torch.randn(4, 3))
    output = functional.linear(torch.randn(5, 3), weight)
    found = watch(find_matrix_uses([output], [weight]))
    loss = output.square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert len(found[0][1]) == 2
    close(total(found, weight), weight.grad)


def test_a_removed_hook_is_silent() -> None:
    weight, rows = nn.Parameter(torch.randn(4, 3)), []
    output = functional.linear(torch.randn(5, 3), weight)
    hook_rows(find_matrix_uses([output], [weight]).products[0], rows.append).remove()
    output.sum().backward()
    assert not rows


def test_rows_are_left_only_when_the_weights_gradient_is_computed() -> None:
    weight, x = nn.Parameter(torch.randn(4, 3)), torch.randn(5, 3, requires_grad=True)
    output = functional.linear(x, weight)
    found = watch(find_matrix_uses([output], [weight]))
    torch.autograd.grad(output.sum(), x, retain_graph=True)
    torch.autograd.grad(output, weight, torch.randn(7, 5, 4), is_grads_batched=True, retain_graph=True)
    assert not found[0][1]
    torch.autograd.grad(output.square().sum(), weight, create_graph=True)
    assert not found[0][1][0].backprops.requires_grad


def test_under_checkpointing_rows_are_lost_and_the_gradient_is_not_disturbed() -> None:
    weight, x = nn.Parameter(torch.randn(3, 3)), torch.randn(5, 3, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        return functional.linear(functional.linear(x, weight).tanh(), weight)

    output = checkpoint(block, x, use_reentrant=False)
    found = watch(find_matrix_uses([output], [weight]))
    output.square().sum().backward()
    assert [rows for _, rows in found] == [[None], [None]]
    close(weight.grad, torch.autograd.grad(block(x).square().sum(), weight)[0])


def test_sparse_data_leave_no_rows() -> None:
    weight, x = nn.Parameter(torch.randn(4, 3)), torch.eye(3).to_sparse()
    output = torch.mm(x, weight.T)
    found = watch(find_matrix_uses([output], [weight]))
    output.sum().backward()
    assert found[0][1] == [None]


def test_tensors_that_are_saved_elsewhere_are_fetched() -> None:
    weight = nn.Parameter(torch.randn(4, 3))
    with torch.autograd.graph.save_on_cpu():
        output = functional.linear(torch.randn(5, 3), weight)
    found = watch(find_matrix_uses([output], [weight]))
    output.square().sum().backward()
    close(total(found, weight), weight.grad)


def test_hooks_keep_neither_the_graph_nor_the_weight() -> None:
    class Mark:
        """Something to point at weakly."""

    weight, mark, rows = nn.Parameter(torch.randn(4, 3)), Mark(), []
    output = functional.linear(torch.randn(5, 3), weight)
    use = find_matrix_uses([output], [weight]).products[0]
    use.node.metadata["mark"] = mark
    handle = hook_rows(use, rows.append)
    in_graph, of_weight = weakref.ref(mark), weakref.ref(weight)
    gc.disable()
    try:
        output.sum().backward()
        del use, mark, output, weight
        assert in_graph() is None and of_weight() is None and len(rows) == 1
    finally:
        gc.enable()
    handle.remove()


def test_rows_that_do_not_divide_become_data_points() -> None:
    rows = Rows(torch.randn(7, 3), torch.randn(7, 2))
    for points_lead in (True, False):
        factors = fold_rows(rows, 5, points_lead)
        assert factors.activations.shape == (7, 1, 3) and factors.backprops.shape == (7, 1, 2)
    assert fold_rows(Rows(torch.randn(0, 3), torch.randn(0, 2)), 0).backprops.shape == (0, 0, 2)
