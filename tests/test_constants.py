"""Constants are made once, serve every mode that they are used under later, and do not pile up."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from gmn_optim import constants, neuron_sets
from gmn_optim.constants import constant, constant_tensor
from gmn_optim.gradients import DecomposedGradient
from gmn_optim.metatrain import Horizons, MetaShape, Unroll, estimators
from gmn_optim.neuron_sets import NeuronSets, gather_neurons
from gmn_optim.neurons import LayerSpec, LayerWiring, chain_spaces
from gmn_optim.nn import NeuronEncoding, neuron_encoding
from gmn_optim.rule import Chunk, Segment, UpdateRule, layout, memory
from gmn_optim.rule.features import time_features, update_averages
from gmn_optim.rule.memory import factor_memories
from gmn_optim.streams import infer_spaces
from gmn_optim.tasks import tasks
from tests.cases import ARMS

SPACES = chain_spaces([2, 1])
CHUNK = Chunk((Segment("w", (2,)), Segment("b", (1,))), learned=True)
KEPT = (
    constants.constant_tensor,
    layout._averaging,
    layout._segment_numbers,
    memory._space_averaging,
    neuron_encoding._encode,
    neuron_sets._member_numbers,
)
STREAM = infer_spaces(
    {"a": LayerSpec(3, 3), "b": LayerSpec(3, 3)}, {name: LayerWiring((0, 1, 2), (0, 1, 2)) for name in "ab"}
)


def remember(name: str, values: Tensor) -> Tensor:
    """Return what a factor memory makes of values (3) that stand for every factor and moment."""
    kept = factor_memories[name]()
    sets = NeuronSets(values.view(1, 3, 1).expand(2, 3, 2), values.view(3, 1).expand(3, 4))
    features, _ = kept.update(kept.init(SPACES, 2, values.detach()), sets, SPACES, values.new_ones(()))
    return features.sets.sum() if features.neurons is None else features.neurons.sum()


def borrow(values: Tensor) -> Tensor:
    """Return what ports of a stream borrow of factors (3) that stand for every row of every layer."""
    factors = DecomposedGradient(values.view(1, 1, 3), values.view(1, 1, 3))
    return gather_neurons({name: factors for name in "ab"}, STREAM, 2).factors.sum()


USERS: dict[str, Callable[[Tensor], Tensor]] = {
    "averages": lambda values: update_averages(torch.zeros(3, 6), values),
    "time features": lambda values: time_features(values[0]),
    "mean of segments": lambda values: CHUNK.mean_per_segment(values.unsqueeze(-1)),
    "elements of segments": lambda values: CHUNK.per_element(values[:2].unsqueeze(-1)),
    "slots": lambda values: remember("slots", values),
    "moments": lambda values: remember("moments", values),
    "streams": borrow,
    "encoding": lambda values: NeuronEncoding()(SPACES) * values.unsqueeze(-1),
}


@pytest.fixture(autouse=True)
def _forget() -> None:
    """Make every constant anew."""
    for kept in KEPT:
        kept.cache_clear()


def gradient(name: str) -> Tensor:
    """Return the gradient (3) of the square of what a user of constants makes."""
    values = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    USERS[name](values).square().sum().backward()
    return values.grad


def first_in_inference_mode(user: Callable[[Tensor], Tensor]) -> None:
    """Use constants without gradients."""
    with torch.inference_mode():
        user(torch.ones(3))


def first_under_transforms(user: Callable[[Tensor], Tensor]) -> None:
    """Use constants while gradients of many copies are taken."""
    torch.func.vmap(torch.func.grad(lambda values: user(values).sum()))(torch.ones(2, 3))


def first_while_traced(user: Callable[[Tensor], Tensor]) -> None:
    """Use constants while operations are written down."""
    make_fx(torch.func.vmap(user))(torch.ones(2, 3))


@pytest.mark.parametrize("first", [first_in_inference_mode, first_under_transforms, first_while_traced])
@pytest.mark.parametrize("name", USERS)
def test_who_comes_first_leaves_no_mark(name: str, first: Callable[..., None]) -> None:
    expected = gradient(name)
    for kept in KEPT:
        kept.cache_clear()
    first(USERS[name])
    assert torch.equal(gradient(name), expected) and expected.any()


@pytest.mark.parametrize("arm", ["slots", "moments", "scheduled"])
def test_meta_training_by_backpropagation_stands_an_evaluation_in_inference_mode_before_it(arm: str) -> None:
    unroll, generator = Unroll(tasks["fashion-mnist-mlp"](), UpdateRule(ARMS[arm])), torch.Generator()
    shape, horizons = MetaShape(unroll.meta_parameters()), Horizons(2, 2)
    with torch.inference_mode():
        unroll.run(unroll.meta_parameters(), unroll.start(generator, 1), unroll.batches(generator, 1, 1))
    estimator = estimators["backprop"](unroll, shape, unrolls=1, truncation=2, horizons=horizons)
    state = estimator.init(generator)
    estimate, _ = estimator.estimate(shape.flatten(unroll.meta_parameters()), state, generator)
    assert estimate.gradient.any()


def test_a_constant_knows_no_mode_of_its_first_caller() -> None:
    @constant()
    def ones(size: int) -> Tensor:
        return torch.ones(size)

    with torch.inference_mode(), torch.device("meta"):
        made = ones(3)
    assert made.device.type == "cpu" and not made.is_inference() and not made.requires_grad
    assert ones(3) is made


def test_the_newest_results_are_kept() -> None:
    sizes: list[int] = []

    @constant(maxsize=2)
    def ones(size: int) -> Tensor:
        sizes.append(size)
        return torch.ones(size)

    for size in (1, 2, 1, 3, 1, 2):
        assert ones(size).shape == (size,)
    assert sizes == [1, 2, 3, 2]


@pytest.mark.parametrize("kept", KEPT)
def test_every_table_of_constants_is_bounded(kept: Callable[..., Tensor]) -> None:
    assert 0 < kept.cache_info().maxsize <= 1024


def test_numbers_are_told_apart_by_dtype() -> None:
    for dtype in (torch.float32, torch.float64):
        made = constant_tensor((0.1, 3.0), dtype, torch.device("cpu"))
        assert made.dtype == dtype and torch.equal(made, torch.tensor([0.1, 3.0], dtype=dtype))


def test_an_error_reaches_the_caller_and_is_not_kept() -> None:
    with pytest.raises(ValueError, match="dimensions"):
        constant_tensor(("one",), torch.float32, torch.device("cpu"))
    assert not constant_tensor.cache_info().currsize
