"""Training commutes with permutations of hidden neurons, and does not see the order of the data points."""

import copy

import pytest
import torch
from torch import Tensor, nn

from gmn_optim import GMNOptimizer
from tests.cases import (
    ARMS,
    DATA_POINTS,
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
@pytest.mark.parametrize("arm", SOME)
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
