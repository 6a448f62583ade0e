"""The products inside attention are found, and their rows put in order are each data point's gradients, in float64."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from gmn_optim.capture.graph import MatrixUse, find_matrix_uses
from gmn_optim.capture.graph_rows import (
    Rows,
    count_attended_points,
    count_data_points,
    fold_rows,
    hook_rows,
    widen_block,
)
from gmn_optim.gradients import DecomposedGradient

POINTS, QUERIES, KEYS = 5, 3, 6


# Claims of exactness are made in float64.
pytestmark = pytest.mark.usefixtures("seeded", "double_precision")


class Case(NamedTuple):
    """How attention is set up and called: widths of keys and values (None: queries are both), what is tied."""

    options: Mapping[str, object]
    widths: tuple[int, int] | None = None
    keys_are_values: bool = False
    uses: tuple[str, ...] = ("in_proj_weight", "out_proj.weight")


SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
CASES = {
    "self": Case({}),
    "self without bias": Case({"bias": False}),
    "self with extra keys": Case({"add_bias_kv": True, "add_zero_attn": True}),
    "cross, one memory": Case({}, (4, 4), True, ("in_proj_weight", "in_proj_weight", "out_proj.weight")),
    "cross, three inputs": Case({}, (4, 4), False, ("in_proj_weight",) * 3 + ("out_proj.weight",)),
    "cross, two widths": Case({"kdim": 6, "vdim": 7}, (6, 7), False, SEPARATE),
    "cross, two widths, extra keys": Case(
        {"kdim": 6, "vdim": 7, "add_bias_kv": True, "bias": False}, (6, 7), False, SEPARATE
    ),
}


def inputs_of(case: Case) -> tuple[Tensor, ...]:
    """Return query, key and value (b, p, i), the same object where the case says so."""
    query = torch.randn(POINTS, QUERIES, 4, requires_grad=True)
    if case.widths is None:
        return query, query, query
    key, value = (torch.randn(POINTS, KEYS, width) for width in case.widths)
    return query, key, key if case.keys_are_values else value


def turned(tensors: tuple[Tensor, ...], batch_first: bool) -> tuple[Tensor, ...]:
    """Return tensors (b, p, i) as the module wants them; what was one object stays one object."""
    if batch_first:
        return tensors
    made = {id(tensor): tensor.transpose(0, 1) for tensor in tensors}
    return tuple(made[id(tensor)] for tensor in tensors)


def of_point(tensors: tuple[Tensor, ...], point: int) -> tuple[Tensor, ...]:
    """Return a batch of one data point."""
    made = {id(tensor): tensor[point : point + 1] for tensor in tensors}
    return tuple(made[id(tensor)] for tensor in tensors)


Loss = Callable[[tuple[Tensor, ...], Tensor], Tensor]


def watch(module: nn.Module, output: Tensor) -> list[tuple[str, MatrixUse, list[Rows]]]:
    """Hook every product with a parameter of the module; return parameter name, use, and where rows will be."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    matrices = [parameter for parameter in module.parameters() if parameter.dim() == 2]
    uses = find_matrix_uses([output], matrices)
    assert not uses.unknown
    found = [(names[id(use.weight)], use, []) for use in uses.products]
    for _, use, rows in found:
        hook_rows(use, rows.append)
    return found


def per_sample(factors: list[DecomposedGradient]) -> Tensor:
    """Return each data point's sum of outer products over all uses."""
    return sum(torch.einsum("bpo,bpi->boi", part.backprops, part.activations) for part in factors)


def expected_shares(module: nn.Module, loss: Loss, inputs: tuple[Tensor, ...], target: Tensor) -> dict[str, Tensor]:
    """Return the gradients of each data point, one after the other."""
    losses = [loss(of_point(inputs, point), target[point : point + 1]) for point in range(POINTS)]
    shares = [torch.autograd.grad(each, list(module.parameters())) for each in losses]
    return {
        name: torch.stack(each)
        for (name, _), each in zip(module.named_parameters(), zip(*shares, strict=True), strict=True)
    }


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_each_data_points_share_is_exact(name: str, batch_first: bool, need_weights: bool) -> None:
    case = CASES[name]
    module = nn.MultiheadAttention(4, 2, batch_first=batch_first, **case.options)
    inputs, target = inputs_of(case), torch.randn(POINTS, QUERIES, 4)

    def attend(inputs: tuple[Tensor, ...]) -> Tensor:
        output = module(*turned(inputs, batch_first), need_weights=need_weights)[0]
        return output if batch_first else output.transpose(0, 1)

    def loss(inputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
        return (attend(inputs) - target).square().sum()

    output = attend(inputs)
    found = watch(module, output)
    assert tuple(sorted(each for each, _, _ in found)) == tuple(sorted(case.uses))
    (output - target).square().sum().backward()
    points = count_attended_points(module, turned(inputs, batch_first)[0])
    expected = expected_shares(module, loss, inputs, target)
    for each in set(case.uses):
        factors = [
            widen_block(fold_rows(rows[0], points, False), use.block) for name, use, rows in found if name == each
        ]
        parameter = module.get_parameter(each)
        torch.testing.assert_close(per_sample(factors), expected[each], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(per_sample(factors).sum(0), parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.options.get("bias", True)])
def test_the_widened_factors_give_the_bias_too(name: str) -> None:
    case = CASES[name]
    module = nn.MultiheadAttention(4, 2, batch_first=True, **case.options)
    output = module(*inputs_of(case))[0]
    found = watch(module, output)
    sums = find_matrix_uses([output], [module.in_proj_bias, module.out_proj.bias])
    assert not sums.unknown and {use.rows.stop for use in sums.sums} >= {4, 12}
    output.square().sum().backward()
    for weight, bias in ((None, module.in_proj_bias), ("out_proj.weight", module.out_proj.bias)):
        uses = [(use, rows[0]) for name, use, rows in found if (name == "out_proj.weight") == (weight is not None)]
        if weight is None and module.in_proj_weight is None:
            continue
        total = sum(widen_block(fold_rows(rows, POINTS, False), use.block).sum_of_backprops() for use, rows in uses)
        torch.testing.assert_close(total, bias.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_a_single_sequence_is_one_data_point(name: str) -> None:
    case = CASES[name]
    module = nn.MultiheadAttention(4, 2, batch_first=True, **case.options)
    inputs = inputs_of(case)
    made = {id(tensor): tensor[0] for tensor in inputs}
    query, key, value = (made[id(tensor)] for tensor in inputs)
    output = module(query, key, value)[0]
    found = watch(module, output)
    output.square().sum().backward()
    for each in set(case.uses):
        points = count_attended_points(module, query)
        factors = [
            widen_block(fold_rows(rows[0], points, False), use.block) for name, use, rows in found if name == each
        ]
        assert {part.activations.shape[0] for part in factors} == {1}
        expected = module.get_parameter(each).grad
        torch.testing.assert_close(per_sample(factors)[0], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_transformer_layers_are_explained(kind: type[nn.Module], batch_first: bool, norm_first: bool) -> None:
    module = kind(4, 2, 8, dropout=0.0, batch_first=batch_first, norm_first=norm_first)
    inputs, target = (torch.randn(POINTS, QUERIES, 4), torch.randn(POINTS, KEYS, 4)), torch.randn(POINTS, QUERIES, 4)
    inputs = inputs[: 2 if kind is nn.TransformerDecoderLayer else 1]

    def loss(inputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
        output = module(*turned(inputs, batch_first))
        return ((output if batch_first else output.transpose(0, 1)) - target).square().sum()

    value = loss(inputs, target)
    found = watch(module, value)
    value.backward()
    expected = expected_shares(module, loss, inputs, target)
    for each in {name for name, _, _ in found}:
        is_attention = "attn" in each
        uses = [(use, rows[0]) for name, use, rows in found if name == each]
        factors = [
            widen_block(fold_rows(rows, POINTS, batch_first and not is_attention), use.block) for use, rows in uses
        ]
        torch.testing.assert_close(per_sample(factors), expected[each], rtol=1e-9, atol=1e-12)
        if batch_first and not is_attention:
            assert all(count_data_points(use) == POINTS for use, _ in uses)
    assert {name for name, _, _ in found} == {name for name, each in module.named_parameters() if each.dim() == 2}


def test_autocast_attention_is_found() -> None:
    module, x = nn.MultiheadAttention(4, 2, batch_first=True).float(), torch.randn(5, 3, 4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(x, x, x)[0]
    found = watch(module, output)
    output.float().square().sum().backward()
    for name, use, rows in found:
        factors = fold_rows(rows[0], 5, False)
        expected = module.get_parameter(name).grad
        torch.testing.assert_close(factors.sum_of_outer_products().float(), expected, rtol=1e-1, atol=1e-1)
        assert len(use.block.rows) == expected.shape[0]
