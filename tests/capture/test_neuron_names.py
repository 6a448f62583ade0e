"""Names go where elements go, and what they claim of an operation commutes with permutations of the neurons."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gmn_optim.capture.neuron_names import UNKNOWN, Names, SameNames, compress, pass_names, varied_axes
from gmn_optim.capture.traced_pass import TracedPass
from gmn_optim.testing.permutations import random_order

pytestmark = pytest.mark.usefixtures("seeded", "double_precision")


class Trace(NamedTuple):
    """What a traced function returned, its names, and which names mean the same."""

    output: Tensor
    names: Names
    same: SameNames


def trace(function: Callable[..., Tensor], *operands: tuple[Tensor, Names]) -> Trace:
    """Run a function of tensors with these names."""
    same = SameNames()
    same.fresh(100)
    passed = TracedPass(same, [])
    for tensor, names in operands:
        if names is not None:
            passed._keep(tensor, names)
    with passed:
        output = function(*(tensor for tensor, _ in operands))
    return Trace(output, passed.lookup(output), same)


def along(shape: tuple[int, ...], axis: int, start: int = 0) -> Tensor:
    """Return a name for each neuron on an axis."""
    return torch.arange(start, start + shape[axis]).view([-1 if k == axis else 1 for k in range(len(shape))])


# ---------------------------------------------------------------------- what moves elements moves names

MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.view(6, 4),
    "flat": lambda x: x.view(-1),
    "reshape of a permutation": lambda x: x.permute(2, 0, 1).reshape(8, 3),
    "flatten": lambda x: x.flatten(1),
    "unflatten": lambda x: x.unflatten(2, (2, 2)),
    "permute": lambda x: x.permute(2, 0, 1),
    "transpose": lambda x: x.transpose(0, 2),
    "mT": lambda x: x.mT,
    "t": lambda x: x[0].t(),
    "movedim": lambda x: x.movedim(0, -1),
    "expand": lambda x: x[:, :1].expand(2, 5, 4),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "squeeze": lambda x: x[:, :, :1].squeeze(),
    "squeeze of one axis": lambda x: x[:1].squeeze(0),
    "slice": lambda x: x[:, 1:],
    "strided slice": lambda x: x[..., ::2],
    "select": lambda x: x[:, 1],
    "narrow": lambda x: x.narrow(2, 1, 2),
    "split": lambda x: x.split([1, 3], 2)[1],
    "chunk": lambda x: x.chunk(2, -1)[1],
    "unbind": lambda x: x.unbind(1)[2],
    "repeat": lambda x: x.repeat(1, 2, 1),
    "tile": lambda x: x.tile(2),
    "repeat_interleave": lambda x: x.repeat_interleave(3, 1),
    "roll": lambda x: x.roll(1, 2),
    "flip": lambda x: x.flip(1),
    "index_select": lambda x: x.index_select(1, torch.tensor([2, 0])),
    "index": lambda x: x[:, [2, 0, 0]],
    "index of two axes": lambda x: x[[1, 0], :, [3, 2]],
    "mask": lambda x: x[:, torch.tensor([True, False, True])],
    "gather": lambda x: x.gather(2, torch.tensor([3, 0, 1]).expand(2, 3, 3)),
    "take_along_dim": lambda x: x.take_along_dim(x.argsort(1, descending=True), 1),
    "cat": lambda x: torch.cat([x[:, 1:], x], 1),
    "stack": lambda x: torch.stack([x, x.flip(0)], 2),
    "hstack": lambda x: torch.hstack([x, x]),
    "constant padding": lambda x: functional.pad(x, (1, 2), value=-1),
    "negative padding": lambda x: functional.pad(x, (-1, 0, 0, 1), value=-1),
    "einsum": lambda x: torch.einsum("abc->cab", x),
    "clone": lambda x: x.mT.clone(),
    "contiguous": lambda x: x.mT.contiguous(),
    "detach": lambda x: x.detach(),
    "another dtype": lambda x: x.float(),
    "there and back": lambda x: x.view(2, 3, 2, 2).transpose(1, 2).reshape(2, 2, 6).view(2, 2, 3, 2).transpose(1, 2),
}


@pytest.mark.parametrize("axis", [0, 1, 2, None])
@pytest.mark.parametrize("move", MOVES)
def test_names_are_moved_like_the_elements_they_stand_at(move: str, axis: int | None) -> None:
    shape = (2, 3, 4)
    elements = torch.arange(24.0).view(shape)
    every = torch.arange(24).view(shape)
    given = every if axis is None else along(shape, axis)
    output, names, _ = trace(MOVES[move], (elements, given))
    expected = [
        given.expand(shape).flatten()[int(element)] if element >= 0 else UNKNOWN for element in output.flatten()
    ]
    assert names is not None and names.expand(output.shape).flatten().tolist() == expected
    assert all(names.shape[k] == 1 or not (names == names.narrow(k, 0, 1)).all() for k in range(names.dim()))


def test_elements_from_elsewhere_have_no_names() -> None:
    given = torch.ones(2, 3)
    _, names, _ = trace(lambda x: torch.cat([x, torch.zeros(2, 2)], 1), (given, along((2, 3), 1)))
    assert names.tolist() == [[0, 1, 2, UNKNOWN, UNKNOWN]]
    _, names, _ = trace(lambda x: torch.cat([torch.zeros(1, 3), x]), (given, along((2, 3), 1)))
    assert names.tolist() == [[UNKNOWN] * 3, [0, 1, 2], [0, 1, 2]]


def test_of_several_tensors_that_are_joined_each_brings_its_own_names() -> None:
    one, other = torch.ones(2, 3), torch.ones(2, 2)
    _, names, _ = trace(lambda x, y: torch.cat([x, y], 1), (one, along((2, 3), 1)), (other, along((2, 2), 1, 7)))
    assert names.tolist() == [[0, 1, 2, 7, 8]]


# ---------------------------------------------------------------------- what is claimed of all else


class Operation(NamedTuple):
    """A function of a tensor of some shape, whose neurons stand on an axis."""

    function: Callable[[Tensor], Tensor]
    shape: tuple[int, ...] = (5, 4)
    axis: int = 1


def attend(values: Tensor, **options: object) -> Tensor:
    """Return what attention makes of values (2, heads, 5, n)."""
    queries, keys = torch.linspace(-1, 1, 2 * 4 * 5 * 3).view(2, 4, 5, 3), torch.linspace(-2, 1, 3).repeat(2, 4, 5, 1)
    keys = (keys * torch.arange(5.0).view(5, 1))[:, : values.shape[1]]
    return functional.scaled_dot_product_attention(queries, keys, values, **options)


def mixed_by_hand(values: Tensor) -> Tensor:
    """Return what attention written out makes of values (2, 3, 5, n)."""
    scores = torch.linspace(-1, 1, 2 * 3 * 5 * 5).view(2, 3, 5, 5).softmax(-1)
    return scores @ values


def swiglu(x: Tensor) -> Tensor:
    """Return the first half times a function of the second."""
    first, second = x.chunk(2, -1)
    return first * functional.silu(second)


def rotary(x: Tensor) -> Tensor:
    """Return pairs of neurons turned by an angle for each position."""
    angle = torch.arange(5.0).view(5, 1)
    return x * angle.cos() + torch.cat([-x[..., 2:], x[..., :2]], -1) * angle.sin()


SPATIAL = {1: (2, 4, 6), 2: (2, 4, 6, 6), 3: (2, 4, 4, 4, 4)}
POOLED = {
    f"{name} {n}d": Operation(lambda x, n=n, f=f: getattr(functional, f"{f}{n}d")(x, 2), SPATIAL[n])
    for name, f in {
        "average pooling": "avg_pool",
        "maximal pooling": "max_pool",
        "adaptive average pooling": "adaptive_avg_pool",
        "adaptive maximal pooling": "adaptive_max_pool",
        "norm pooling": "lp_pool",
    }.items()
    for n in (1, 2, 3)
    if name != "norm pooling"
}
RESIZED = {
    f"{mode} interpolation": Operation(
        lambda x, mode=mode: functional.interpolate(x, scale_factor=2, mode=mode), SPATIAL[n]
    )
    for mode, n in {"nearest": 1, "nearest-exact": 2, "linear": 1, "bilinear": 2, "bicubic": 2, "trilinear": 3}.items()
}
REDUCED = {
    f"{name}{' keeping axes' if keeps else ''}": Operation(
        lambda x, reduce=reduce, keeps=keeps: reduce(x, keeps), (2, 3, 4, 3)
    )
    for keeps in (True, False)
    for name, reduce in {
        "mean": lambda x, keeps: x.mean(-1, keeps),
        "mean of two axes": lambda x, keeps: x.mean((2, 3), keeps),
        "sum": lambda x, keeps: x.sum((0, -1), keeps),
        "amax": lambda x, keeps: x.amax(2, keeps),
        "amin": lambda x, keeps: x.amin(dim=(2,), keepdim=keeps),
        "max": lambda x, keeps: x.max(3, keeps).values,
        "min": lambda x, keeps: x.min(3, keeps).values,
        "var": lambda x, keeps: x.var((2, 3), keepdim=keeps),
        "std": lambda x, keeps: x.std(0, keepdim=keeps),
        "logsumexp": lambda x, keeps: x.logsumexp(-1, keeps),
        "prod": lambda x, keeps: x.prod(2, keeps),
        "norm": lambda x, keeps: x.norm(2, dim=3, keepdim=keeps),
        "vector norm": lambda x, keeps: torch.linalg.vector_norm(x, 1, dim=(2, 3), keepdim=keeps),
    }.items()
}
CLAIMED: dict[str, Operation] = {
    **{
        f.__name__: Operation(f)
        for f in (
            torch.relu, torch.tanh, torch.sigmoid, torch.exp, torch.square, torch.abs, torch.neg, torch.sin,
            functional.gelu, functional.silu, functional.mish, functional.softplus, functional.elu, functional.selu,
            functional.celu, functional.leaky_relu, functional.hardswish, functional.hardsigmoid, functional.hardtanh,
            functional.relu6, functional.logsigmoid, functional.softsign, functional.tanhshrink, functional.hardshrink,
            functional.rrelu,
        )
    },
    "threshold": Operation(lambda x: functional.threshold(x, 0.1, 0.0)),
    "prelu": Operation(lambda x: functional.prelu(x, torch.tensor([0.2]))),
    **{
        f"{f.__name__} in place": Operation(lambda x, f=f: f(x.clone(), inplace=True))
        for f in (
            functional.relu, functional.leaky_relu, functional.elu, functional.celu, functional.selu, functional.silu,
            functional.mish, functional.hardswish, functional.hardsigmoid, functional.hardtanh, functional.rrelu,
        )
    },
    "threshold in place": Operation(lambda x: functional.threshold(x.clone(), 0.1, 0.0, inplace=True)),
    "numbers": Operation(lambda x: 3 * x / 2 - torch.ones(4)),
    "a broadcast term": Operation(lambda x: x + torch.arange(5.0).view(5, 1)),
    "where": Operation(lambda x: torch.where(x > 0, x, 0.1 * x)),
    "clamp": Operation(lambda x: x.clamp(-0.5, 0.5)),
    "masked_fill": Operation(lambda x: x.masked_fill(torch.tensor([[True], [False], [True], [True], [False]]), 0.0)),
    "dropout in evaluation": Operation(lambda x: functional.dropout(x, training=False)),
    "a scale of the neurons together": Operation(lambda x: x / x.norm(dim=1, keepdim=True)),
    "their mean": Operation(lambda x: x - x.mean(1, keepdim=True)),
    "softmax of the neurons": Operation(lambda x: x.softmax(1)),
    "softmax of the others": Operation(lambda x: x.softmax(0)),
    "log_softmax": Operation(lambda x: x.log_softmax(1)),
    "normalize": Operation(lambda x: functional.normalize(x, dim=1)),
    "normalize along another axis": Operation(lambda x: functional.normalize(x, dim=0)),
    "layer_norm": Operation(lambda x: functional.layer_norm(x, (4,))),
    "layer_norm of other axes": Operation(lambda x: functional.layer_norm(x, (6,)), SPATIAL[1]),
    "rms_norm": Operation(lambda x: functional.rms_norm(x, (4,))),
    "group_norm": Operation(lambda x: functional.group_norm(x, 1), SPATIAL[2]),
    "instance_norm": Operation(lambda x: functional.instance_norm(x), SPATIAL[2]),
    "batch_norm": Operation(lambda x: functional.batch_norm(x, None, None, training=True), SPATIAL[2]),
    "cumsum of the others": Operation(lambda x: x.cumsum(0)),
    "cumprod of the others": Operation(lambda x: x.cumprod(0)),
    "logcumsumexp of the others": Operation(lambda x: x.logcumsumexp(dim=0)),
    "a matrix from the left": Operation(lambda x: torch.linspace(-1, 1, 15).view(3, 5) @ x),
    "a matrix from the right": Operation(lambda x: x @ torch.linspace(-1, 1, 12).view(4, 3), axis=0),
    "a sum and a product": Operation(lambda x: torch.addmm(torch.ones(3, 4), torch.linspace(0, 1, 15).view(3, 5), x)),
    "products of matrices": Operation(lambda x: torch.linspace(-1, 1, 30).view(2, 3, 5) @ x, (2, 5, 4), 2),
    "a sum and products": Operation(
        lambda x: torch.baddbmm(torch.ones(2, 3, 4), torch.linspace(0, 1, 30).view(2, 3, 5), x), (2, 5, 4), 2
    ),
    "a linear layer of other axes": Operation(
        lambda x: functional.linear(x, torch.linspace(-1, 1, 18).view(3, 6)), SPATIAL[1]
    ),
    "attention": Operation(attend, (2, 4, 5, 3), 3),
    "heads of attention written out": Operation(mixed_by_hand, (2, 3, 5, 4), 3),
    "causal attention": Operation(lambda x: attend(x, is_causal=True), (2, 4, 5, 3), 3),
    "attention with a mask": Operation(lambda x: attend(x, attn_mask=torch.eye(5)), (2, 4, 5, 3), 3),
    "attention of shared values": Operation(lambda x: attend(x, enable_gqa=True), (2, 2, 5, 3), 3),
    "glu": Operation(functional.glu, (5, 6)),
    "glu of another axis": Operation(lambda x: functional.glu(x, 0), (6, 4)),
    "a gate written out": Operation(swiglu, (5, 6)),
    "rotary positions": Operation(rotary),
    "several steps": Operation(
        lambda x: functional.glu(x.view(5, 2, 3).tanh().reshape(5, 6)).t().softmax(0).t(), (5, 6)
    ),
    **POOLED,
    **RESIZED,
    **REDUCED,
}  # fmt: skip


def places_of(classes: list[int]) -> dict[int, list[int]]:
    """Return where each class stands."""
    found: dict[int, list[int]] = {}
    for place, name in enumerate(classes):
        found.setdefault(name, []).append(place)
    return found


def reordered(classes: list[int], successor: dict[int, int]) -> Tensor:
    """Return which place goes where when each class is followed by another, the k-th place by the k-th place."""
    places = places_of(classes)
    return torch.tensor([places[successor[name]][places[name].index(place)] for place, name in enumerate(classes)])


@pytest.mark.parametrize("name", CLAIMED)
def test_what_is_claimed_commutes_with_permutations_of_the_neurons(name: str) -> None:
    function, shape, axis = CLAIMED[name]
    given = torch.randn(shape)

    def of_moved(x: Tensor) -> Tensor:
        torch.manual_seed(1)
        return function(x)

    output, names, same = trace(of_moved, (given, along(shape, axis)))
    assert names is not None and len(varied_axes(names)) == 1
    (out_axis,) = varied_axes(names)
    before, after = (list(same.settle(each.flatten())) for each in (torch.arange(shape[axis]), names))
    classes = sorted(set(before))
    order = random_order(len(classes), torch.Generator().manual_seed(2)).tolist()
    successor = dict(zip(classes, (classes[k] for k in order), strict=True))
    moved = of_moved(given.index_select(axis, reordered(before, successor)))
    expected = output.index_select(out_axis, reordered(after, successor))
    assert not torch.allclose(moved, output)
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=1e-12)


def test_the_heads_of_attention_keep_their_names() -> None:
    values = torch.randn(2, 4, 5, 3)
    heads = torch.arange(12).view(1, 4, 1, 3)
    assert torch.equal(trace(attend, (values, heads)).names, heads)
    shared = trace(lambda x: attend(x, enable_gqa=True), (values[:, :2].clone(), heads[:, :2])).names
    assert torch.equal(shared, heads[:, [0, 0, 1, 1]])
    by_hand = trace(mixed_by_hand, (values[:, :3].clone(), heads[:, :3])).names
    assert torch.equal(by_hand, heads[:, :3])


UNCLAIMED: dict[str, Operation] = {
    "a product with a matrix": Operation(lambda x: x @ torch.ones(4, 4), (4, 4)),
    "a product with itself": Operation(lambda x: x @ x.mT, (4, 4)),
    "a linear layer": Operation(lambda x: functional.linear(x, torch.ones(4, 4)), (2, 4, 4), 2),
    "a convolution": Operation(lambda x: functional.conv1d(x, torch.ones(4, 4, 1)), (2, 4, 4)),
    "an outer sum": Operation(lambda x: x[0] + x[0].unsqueeze(1), (4, 4)),
    "a sum with its transpose": Operation(lambda x: x + x.mT, (4, 4)),
    "a mean of the neurons": Operation(lambda x: x.mean(1), (4, 4)),
    "a sum of all": Operation(lambda x: x.sum(), (4, 4)),
    "a maximum of the neurons": Operation(lambda x: x.max(1, keepdim=True).values, (4, 4)),
    "a norm of the neurons": Operation(lambda x: x.norm(2, dim=1), (4, 4, 4, 4)),
    "a vector norm of the neurons": Operation(lambda x: torch.linalg.vector_norm(x, 2, dim=(1,)), (4, 4, 4, 4)),
    "a variance of the neurons": Operation(lambda x: x.var(1, correction=0), (4, 4, 4)),
    "a sum of two axes": Operation(lambda x: x.sum((0, 1)), (4, 4, 4)),
    "cumsum": Operation(lambda x: x.cumsum(1), (4, 4)),
    "cumprod": Operation(lambda x: x.cumprod(-1), (4, 4)),
    "logcumsumexp": Operation(lambda x: x.logcumsumexp(1), (4, 4)),
    "sort": Operation(lambda x: x.sort(1).values, (4, 4)),
    "topk": Operation(lambda x: x.topk(4, 1).values, (4, 4)),
    "tril": Operation(torch.tril, (4, 4)),
    "inverse": Operation(lambda x: torch.linalg.inv(x + 9 * torch.eye(4)), (4, 4)),
    "fourier transform": Operation(lambda x: torch.fft.fft(x).abs(), (4, 4)),
    "pooling of the neurons": Operation(lambda x: functional.avg_pool1d(x, 3, 1, 1), (2, 4, 4), 2),
    "interpolation of the neurons": Operation(lambda x: functional.interpolate(x, size=4), (2, 4, 4), 2),
    "attention between the neurons": Operation(attend, (2, 4, 5, 3), 2),
    "pixel_shuffle": Operation(lambda x: functional.pixel_shuffle(x, 2), (2, 4, 4, 4)),
    "unfold": Operation(lambda x: functional.unfold(x, 1), (2, 4, 4, 4)),
    "linear attention": Operation(lambda x: x.softmax(-1) @ (x.mT @ x), (2, 4, 4), 2),
}


@pytest.mark.parametrize("name", UNCLAIMED)
def test_nothing_is_claimed_of_what_mixes_neurons(name: str) -> None:
    function, shape, axis = UNCLAIMED[name]
    names = trace(function, (torch.randn(shape), along(shape, axis))).names
    assert names is None or not varied_axes(names)


def test_an_unknown_operation_returns_a_tensor_without_names_for_each_of_its_outputs() -> None:
    matrix = torch.randn(3, 3)
    outputs = torch.ops.aten.linalg_qr(matrix)
    names = pass_names(
        torch.ops.aten.linalg_qr.default, (matrix,), {}, outputs, lambda _: along((3, 3), 1), lambda *_: None
    )
    assert names == [None, None]


# ---------------------------------------------------------------------- which names mean the same


def test_an_elementwise_operation_of_two_tensors_equates_their_neurons() -> None:
    one, other = torch.ones(5, 3), torch.ones(3)
    _, names, same = trace(torch.add, (one, along((5, 3), 1)), (other, along((3,), 0, 10)))
    assert names.tolist() == [[0, 1, 2]] and same.settle(torch.tensor([10, 11, 12])) == (0, 1, 2)


def test_unknown_neurons_take_the_names_of_those_that_they_are_added_to() -> None:
    one, other = torch.tensor([[0, UNKNOWN, 2]]), torch.tensor([[10, 11, UNKNOWN]])
    _, names, same = trace(torch.mul, (torch.ones(5, 3), one), (torch.ones(5, 3), other))
    assert names.tolist() == [[0, 11, 2]] and same.settle(torch.tensor([10, 11, 2])) == (0, 11, 2)


def test_outer_sums_equate_nothing() -> None:
    _, names, same = trace(torch.add, (torch.ones(1, 3), along((1, 3), 1)), (torch.ones(3, 1), along((3, 1), 0, 10)))
    assert names is None and same.settle(torch.arange(20)) == tuple(range(20))


def test_one_neuron_alone_may_scale_many() -> None:
    _, names, same = trace(torch.mul, (torch.ones(5, 3), along((5, 3), 1)), (torch.ones(5, 1), torch.tensor([[10]])))
    assert names.tolist() == [[0, 1, 2]] and same.settle(torch.tensor([10, 0])) == (10, 0)


@pytest.mark.parametrize("gate", [functional.glu, swiglu])
def test_a_gate_and_what_it_gates_are_one_neuron(gate: Callable[[Tensor], Tensor]) -> None:
    _, names, same = trace(gate, (torch.ones(5, 6), along((5, 6), 1)))
    assert same.settle(names) == (0, 1, 2) if names.dim() == 1 else same.settle(names.flatten()) == (0, 1, 2)
    assert same.settle(torch.arange(6)) == (0, 1, 2, 0, 1, 2)


def test_names_that_mean_the_same_are_the_classes_that_merging_sets_gives() -> None:
    generator = torch.Generator().manual_seed(0)
    same, classes = SameNames(), [{number} for number in range(40)]
    assert same.fresh(40).tolist() == list(range(40))
    for _ in range(30):
        pair = torch.randint(UNKNOWN, 40, (2,), generator=generator)
        same.equate(*pair.unsqueeze(1))
        if UNKNOWN not in pair.tolist():
            touched = [each for each in classes if each & set(pair.tolist())]
            classes = [each for each in classes if each not in touched] + [set.union(*touched)]
    found = same.settle(torch.arange(40))
    assert found == tuple(min(each) for number in range(40) for each in classes if number in each)
    assert same.fresh(2).tolist() == [40, 41]


def test_compressed_names_are_the_same_names() -> None:
    full = torch.arange(3).view(3, 1, 1).expand(3, 4, 2)
    for names in (full, full.clone(), torch.arange(24).view(3, 4, 2), torch.zeros(3, 4, 2)):
        small = compress(names)
        assert torch.equal(small.expand(names.shape), names)
        assert varied_axes(small) == [axis for axis in range(3) if not (names == names.narrow(axis, 0, 1)).all()]


# ---------------------------------------------------------------------- what is written over


class Write(NamedTuple):
    """What is written into a tensor (4, 4), and the names of its neurons afterwards; None if nothing is known."""

    write: Callable[[Tensor], object]
    names: list[int] | None


def set_slice(x: Tensor) -> None:
    """Write one half over the other."""
    x[:, :2] = x[:, 2:].clone()


def set_index(x: Tensor) -> None:
    """Write neurons over others by their numbers."""
    x[:, [0, 1]] = x[:, [2, 3]]


WRITES = {
    "an elementwise function": Write(torch.relu_, [0, 1, 2, 3]),
    "an elementwise function of a view": Write(lambda x: x.view(2, 2, 4).relu_(), [0, 1, 2, 3]),
    "an elementwise function of a part": Write(lambda x: x[:, 1:].sigmoid_(), [0, 1, 2, 3]),
    "a number added": Write(lambda x: x.add_(1), [0, 1, 2, 3]),
    "a tensor added": Write(lambda x: x.add_(torch.ones(4, 4)), [0, 1, 2, 3]),
    "itself added": Write(lambda x: x.add_(x), [0, 1, 2, 3]),
    "itself copied": Write(lambda x: x.copy_(x.clone()), [0, 1, 2, 3]),
    "itself in another order": Write(lambda x: x.copy_(x.flip(1)), [3, 2, 1, 0]),
    "a part over another": Write(set_slice, None),
    "a part over another by numbers": Write(set_index, None),
    "zeros": Write(torch.zero_, None),
    "zeros in a part": Write(lambda x: x[:, 1:].zero_(), None),
    "zeros in a view that no rule knows": Write(lambda x: x.diagonal().zero_(), None),
    "another tensor": Write(lambda x: x.copy_(torch.ones(4, 4)), None),
    "an outer sum": Write(lambda x: x.add_(x[0].clone().unsqueeze(1)), None),
    "running sums": Write(lambda x: x.cumsum_(1), None),
    "random numbers": Write(lambda x: x.normal_(), None),
    "an index": Write(lambda x: x.index_fill_(1, torch.tensor([0]), 2.0), None),
    "a list of tensors": Write(lambda x: torch._foreach_zero_([x]), None),
    "a result": Write(lambda x: torch.mm(torch.ones(4, 4), torch.ones(4, 4), out=x), None),
}


@pytest.mark.parametrize("name", WRITES)
def test_names_follow_what_is_written_over_a_tensor(name: str) -> None:
    write, expected = WRITES[name]

    def written(x: Tensor) -> Tensor:
        write(x)
        return x

    names = trace(written, (torch.randn(4, 4), along((4, 4), 1))).names
    assert (names if names is None else names.flatten().tolist()) == expected


def test_views_know_what_is_written_over_the_whole() -> None:
    def written(x: Tensor) -> Tensor:
        view = x.view(2, 8)
        x.copy_(torch.ones(4, 4))
        return view

    assert trace(written, (torch.randn(4, 4), along((4, 4), 1))).names is None


def test_results_that_are_written_into_a_given_tensor_are_not_touched() -> None:
    given = torch.randn(2, 3)

    def joined(x: Tensor) -> Tensor:
        return torch.cat([x, x], 1, out=torch.zeros(2, 6))

    output, names, _ = trace(joined, (given, along((2, 3), 1)))
    assert torch.equal(output, given.repeat(1, 2)) and names is None
