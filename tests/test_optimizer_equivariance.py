"""Training commutes with permutations of hidden neurons, and does not see the order of the data points."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from gmn_optim import GMNOptimizer
from tests import models
from tests.cases import (
    ARMS,
    DATA_POINTS,
    IN_EIGENBASIS,
    LEARNED,
    MODELS,
    SOME,
    WITH_FACTORS,
    assert_same,
    distance,
    make_case,
    make_rule,
    optimizer_for,
    train,
)

STEPS = 20
CLOSE = {"rtol": 1e-9, "atol": 1e-9}

# What a pair of consecutive layers with an elementwise function between them looks like, in many ways of writing it.
CHAINS = ["relu", "tanh", "in place", "functional", "no biases", "sequences"]

BATCH_SIZES = [1, DATA_POINTS - 2, DATA_POINTS, DATA_POINTS + 5]


def permute_hidden(model: nn.Module, seed: int) -> nn.Module:
    """Return a copy of a chain of layers with the neurons between each two permuted; it computes the same."""
    permuted = copy.deepcopy(model)
    layers = [module for module in permuted.modules() if isinstance(module, nn.Linear)]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for writer, reader in zip(layers[:-1], layers[1:], strict=True):
            order = torch.randperm(writer.out_features, generator=generator)
            writer.weight.copy_(writer.weight[order])
            if writer.bias is not None:
                writer.bias.copy_(writer.bias[order])
            reader.weight.copy_(reader.weight[:, order])
    return permuted


def doubled(name: str, size: int) -> tuple[nn.Module, list[Tensor]]:
    """Return a model in float64 and batches of ``size`` data points."""
    model, batches = make_case(MODELS[name], STEPS * 2)
    pooled = torch.cat(batches).double()
    order = torch.randint(len(pooled), (STEPS, size), generator=torch.Generator().manual_seed(3))
    noise = torch.randn(STEPS, size, *pooled.shape[1:], generator=torch.Generator().manual_seed(4)).double()
    return model.double(), list(pooled[order] + 0.1 * noise)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("arm", LEARNED)
def test_permuting_hidden_neurons_commutes_with_training(name, arm) -> None:
    model, batches = doubled(name, 8)
    start = copy.deepcopy(model)
    permuted = permute_hidden(model, seed=5)
    for each in (model, permuted):
        train(each, optimizer_for(each, arm), batches)
    wanted = permute_hidden(model, seed=5)
    assert distance(permuted, model) > 0.01 and distance(model, start) > 0.01
    assert_same(permuted, wanted, **CLOSE)


@pytest.mark.parametrize("size", BATCH_SIZES)
@pytest.mark.parametrize("memory", ["slots", "moments"])
def test_permuting_hidden_neurons_commutes_with_training_at_any_batch_size(memory, size) -> None:
    model, batches = doubled("relu", size)
    permuted = permute_hidden(model, seed=6)
    for each in (model, permuted):
        train(each, optimizer_for(each, memory), batches)
    assert_same(permuted, permute_hidden(model, seed=6), **CLOSE)


@pytest.mark.parametrize("size", BATCH_SIZES)
@pytest.mark.parametrize("arm", [*SOME, *IN_EIGENBASIS])
def test_the_order_of_the_data_points_is_immaterial(arm, size) -> None:
    model, batches = doubled("relu", size)
    twin, generator = copy.deepcopy(model), torch.Generator().manual_seed(7)
    train(model, optimizer_for(model, arm), batches)
    train(twin, optimizer_for(twin, arm), [batch[torch.randperm(size, generator=generator)] for batch in batches])
    assert_same(twin, model, **CLOSE)


@pytest.mark.parametrize("name", ["layer norm", "reused", "tied", "sequences"])
@pytest.mark.parametrize("arm", SOME)
def test_the_order_of_the_data_points_is_immaterial_to_other_models(name, arm) -> None:
    model, batches = doubled(name, 8)
    twin, generator = copy.deepcopy(model), torch.Generator().manual_seed(7)
    train(model, optimizer_for(model, arm), batches)
    train(twin, optimizer_for(twin, arm), [batch[torch.randperm(8, generator=generator)] for batch in batches])
    assert_same(twin, model, **CLOSE)


@pytest.mark.parametrize("arm", WITH_FACTORS)
def test_the_order_of_data_points_without_gradient_is_immaterial(arm) -> None:
    model, batches = doubled("relu", 8)
    twin, generator = copy.deepcopy(model), torch.Generator().manual_seed(7)
    counts = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]).double()
    for each, is_shuffled in ((model, False), (twin, True)):
        optimizer = optimizer_for(each, arm)
        for batch in batches:
            order = torch.randperm(8, generator=generator) if is_shuffled else torch.arange(8)
            optimizer.zero_grad()
            ((each(batch[order]) - 0.5).square().mean(1) * counts[order]).sum().backward()
            optimizer.step()
    assert_same(twin, model, **CLOSE)


@pytest.mark.parametrize("arm", ["slots", "moments"])
def test_permuting_also_what_is_no_symmetry_is_noticed(arm) -> None:
    model, batches = doubled("relu", 8)
    shuffled = copy.deepcopy(model)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        shuffled[0].weight.copy_(model[0].weight[:, order])
    train(model, optimizer_for(model, arm), batches)
    train(shuffled, optimizer_for(shuffled, arm), [batch[:, order] for batch in batches])
    with torch.no_grad():
        shuffled[0].weight.copy_(shuffled[0].weight[:, order.argsort()])
    assert distance(shuffled, model) > 1e-6, "input neurons carry numbers, so their order counts"


def test_without_neuron_numbers_input_neurons_may_be_permuted_too() -> None:
    arm = ARMS["moments"]
    numberless = type(arm)(**{**vars(arm), "gradmetanet": type(arm.gradmetanet)(width=8, neuron_numbers=False)})
    template = make_rule("moments")
    rule = type(template)(numberless).requires_grad_(False)
    rule.load_state_dict(template.state_dict())
    model, batches = doubled("relu", 8)
    shuffled = copy.deepcopy(model)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        shuffled[0].weight.copy_(model[0].weight[:, order])
    train(model, GMNOptimizer(model, weights=rule), batches)
    train(shuffled, GMNOptimizer(shuffled, weights=rule), [batch[:, order] for batch in batches])
    with torch.no_grad():
        shuffled[0].weight.copy_(shuffled[0].weight[:, order.argsort()])
    assert_same(shuffled, model, **CLOSE)


# ---------------------------------------------------------------------- streams, heads and channels


def reorder(module: nn.Module, outputs: Tensor | None = None, inputs: Tensor | None = None) -> None:
    """Put the neurons that a layer writes and reads in a new order."""
    is_transposed = isinstance(module, nn.ConvTranspose2d)
    per_output = {module._buffers.get(name) for name in ("running_mean", "running_var")}
    with torch.no_grad():
        for values in {module.weight, getattr(module, "bias", None), *per_output} - {None}:
            is_matrix = values.dim() > 1
            for axis, order in ((0, outputs), (1, inputs)):
                axis = 1 - axis if is_transposed and is_matrix else axis
                if order is not None and (is_matrix or axis == 0):
                    values.copy_(values.index_select(axis, order))


class Draw:
    """Draws orders of neurons."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def order(self, size: int) -> Tensor:
        """Return an order of so many neurons."""
        return torch.randperm(size, generator=self._generator)

    def heads(self, order: Tensor, size: int) -> Tensor:
        """Return an order of the neurons of heads of a size: the heads in the given order, each in one of its own."""
        return torch.cat([size * int(head) + self.order(size) for head in order])


def permute_skip_mlp(model: models.SkipMLP, draw: Draw) -> None:
    """Permute the stream, the hidden neurons, and gates together with what they gate."""
    stream, hidden, gate = draw.order(models.WIDTH), draw.order(6), draw.order(5)
    reorder(model.first, stream)
    reorder(model.up, hidden, stream)
    reorder(model.down, stream, hidden)
    reorder(model.norm, stream)
    reorder(model.gated, torch.cat([gate, 5 + gate]), stream)
    reorder(model.back, stream, gate)
    reorder(model.head, None, stream)


def permute_block(block: models.Block, draw: Draw, stream: Tensor) -> None:
    """Permute heads, the neurons within them, and the hidden neurons; queries and keys are permuted together."""
    heads, size, hidden = draw.order(models.HEADS), models.WIDTH // models.HEADS, draw.order(12)
    queries, values = draw.heads(heads, size), draw.heads(heads, size)
    for norm in (block.norm1, block.norm2):
        reorder(norm, stream)
    for layer, order in ((block.attention.q, queries), (block.attention.k, queries), (block.attention.v, values)):
        reorder(layer, order, stream)
    reorder(block.attention.o, stream, values)
    reorder(block.up, hidden, stream)
    reorder(block.down, stream, hidden)


def permute_gpt(model: models.GPT, draw: Draw) -> None:
    """Permute the stream and what is inside of the blocks."""
    stream = draw.order(models.WIDTH)
    for layer in {model.tokens.weight: model.tokens, model.head.weight: model.head, None: model.positions}.values():
        reorder(layer, None, stream)
    reorder(model.norm, stream)
    for block in model.blocks:
        permute_block(block, draw, stream)


def permute_vit(model: models.ViT, draw: Draw) -> None:
    """Permute the stream, class token and positions with it, and what is inside of the block."""
    stream = draw.order(models.WIDTH)
    reorder(model.patches, stream)
    with torch.no_grad():
        for parameter in (model.token, model.positions):
            if parameter is not None:
                parameter.copy_(parameter[..., stream])
    permute_block(model.block, draw, stream)
    reorder(model.norm, stream)
    reorder(model.head, None, stream)


def permute_resnet(model: models.ResNet, draw: Draw) -> None:
    """Permute all channels; those of both branches of the sum are permuted together."""
    stem, hidden, stream = draw.order(4), draw.order(6), draw.order(6)
    for layer, outputs, inputs in (
        (model.stem, stem, None),
        (model.norm0, stem, None),
        (model.conv1, hidden, stem),
        (model.norm1, hidden, None),
        (model.conv2, stream, hidden),
        (model.norm2, stream, None),
        (model.skip, stream, stem),
        (model.norm3, stream, None),
        (model.head, None, stream),
    ):
        reorder(layer, outputs, inputs)


def permute_upsampling(model: models.Upsampling, draw: Draw) -> None:
    """Permute all channels."""
    inner, stream = draw.order(4), draw.order(6)
    reorder(model.down, inner)
    reorder(model.up, stream, inner)
    reorder(model.side, stream)
    reorder(model.out, None, stream)


class Symmetric(NamedTuple):
    """A model, what it is trained on, and what permutes its neurons without changing what it computes."""

    model: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    permute: Callable[[Any, Draw], None]


def texts() -> Tensor:
    """Return tokens."""
    return torch.randint(0, models.VOCABULARY, (7, models.TOKENS))


SYMMETRIC = {
    "skip connections": Symmetric(models.SkipMLP, lambda: torch.randn(9, 5), permute_skip_mlp),
    "language model": Symmetric(models.GPT, texts, permute_gpt),
    "tied language model": Symmetric(lambda: models.GPT(tied=True, blocks=1), texts, permute_gpt),
    "vision model, class token": Symmetric(lambda: models.ViT(True), lambda: torch.randn(7, 1, 4, 4), permute_vit),
    "vision model, mean": Symmetric(lambda: models.ViT(False), lambda: torch.randn(7, 1, 4, 4), permute_vit),
    "residual convolutions": Symmetric(models.ResNet, lambda: torch.randn(7, 2, 6, 6), permute_resnet),
    "upsampling": Symmetric(models.Upsampling, lambda: torch.randn(7, 2, 4, 4), permute_upsampling),
}


def make_symmetric(name: str) -> tuple[nn.Module, list[Tensor]]:
    """Return a model in float64 and ten batches."""
    torch.manual_seed(0)
    model, batches = SYMMETRIC[name].model().double(), [SYMMETRIC[name].inputs() for _ in range(10)]
    return model, [batch.double() if batch.is_floating_point() else batch for batch in batches]


def permuted(model: nn.Module, name: str, seed: int) -> nn.Module:
    """Return a copy with permuted neurons."""
    twin = copy.deepcopy(model)
    SYMMETRIC[name].permute(twin, Draw(seed))
    return twin


@pytest.mark.parametrize("rows", [None, 10])
@pytest.mark.parametrize("name", SYMMETRIC)
@pytest.mark.parametrize("arm", ["slots", "moments"])
def test_permuting_streams_heads_and_channels_commutes_with_training(arm, name, rows) -> None:
    model, batches = make_symmetric(name)
    start, twin = copy.deepcopy(model), permuted(model, name, seed=5)
    torch.testing.assert_close(twin(batches[0]), model(batches[0]), rtol=1e-10, atol=1e-12)
    for each in (model, twin):
        train(each, optimizer_for(each, arm, rows=rows), batches)
    assert distance(twin, model) > 0.01 and distance(model, start) > 0.01
    assert_same(twin, permuted(model, name, seed=5), **CLOSE)


@pytest.mark.parametrize("rows", [None, 10])
@pytest.mark.parametrize("name", SYMMETRIC)
@pytest.mark.parametrize("arm", ["slots", "moments"])
def test_the_order_of_the_data_points_is_immaterial_to_streams_heads_and_channels(arm, name, rows) -> None:
    model, batches = make_symmetric(name)
    twin, generator = copy.deepcopy(model), torch.Generator().manual_seed(7)
    train(model, optimizer_for(model, arm, rows=rows), batches)
    shuffled = [batch[torch.randperm(len(batch), generator=generator)] for batch in batches]
    train(twin, optimizer_for(twin, arm, rows=rows), shuffled)
    assert_same(twin, model, **CLOSE)
