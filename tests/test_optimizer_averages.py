"""Averages for evaluation: what they are, the way back bit by bit, and what happens to whoever forgets it."""

import copy
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from gmn_optim import GMNOptimizer
from gmn_optim.errors import EvaluationModeError
from gmn_optim.rule.schedule_free import MISSED_BETA, SMALL_SHARPNESS
from tests import reference
from tests.cases import (
    ARMS,
    MODELS,
    assert_equal_states,
    assert_same,
    distance,
    loss_of,
    make_case,
    make_rule,
    optimizer_for,
    saved_and_loaded,
    snapshot,
    train,
)

AVERAGED = [name for name, config in ARMS.items() if "schedule_free" in config.nominal]
PLAIN = [name for name in ARMS if name not in AVERAGED]


def path_of(model: nn.Module, optimizer: GMNOptimizer, batches: list[Tensor]) -> dict[str, list[Tensor]]:
    """Train, and return every parameter's values from the first to the last."""
    path = {name: [value] for name, value in snapshot(model).items()}
    for batch in batches:
        train(model, optimizer, [batch])
        for name, value in snapshot(model).items():
            path[name].append(value)
    return path


def averages(model: nn.Module, optimizer: GMNOptimizer) -> dict[str, Tensor]:
    """Return what evaluation sees."""
    optimizer.eval()
    found = snapshot(model)
    optimizer.train()
    return found


@pytest.mark.parametrize("name", [name for name in MODELS if name != "dropout"])
@pytest.mark.parametrize("arm", AVERAGED)
def test_they_are_the_averages_of_all_newest_points(arm: str, name: str) -> None:
    model, batches = make_case(MODELS[name], 25)
    model.double()
    batches = [batch.double() if batch.is_floating_point() else batch for batch in batches]
    optimizer = optimizer_for(model, arm)
    paths = path_of(model, optimizer, batches)
    terms, found = make_rule(arm).double().nominal, averages(model, optimizer)
    for parameter, (key, path) in zip(model.parameters(), paths.items(), strict=True):
        beta = terms.beta().item()
        if optimizer.state[parameter].get("average_share", torch.ones(())).item() == MISSED_BETA:
            beta = MISSED_BETA
        slow = reference.average_of_path(path, beta, terms.sharpness().item())
        torch.testing.assert_close(found[key], slow, rtol=1e-9, atol=1e-11)
        if parameter in optimizer.state and (path[0] != path[-1]).any():
            assert not torch.equal(found[key], path[-1])


def test_where_factors_miss_the_gradient_they_are_closer(make_model, doubles) -> None:
    model = make_model(torch.float64)
    optimizer = GMNOptimizer(model, weights=None, nominal="kronecker_schedule_free")
    path = {name: [value] for name, value in snapshot(model).items()}
    for batch in doubles:
        inputs = batch.requires_grad_()
        optimizer.zero_grad()
        (slope,) = torch.autograd.grad(model(inputs).square().sum(), inputs, create_graph=True)
        slope.square().mean().backward()
        optimizer.step()
        for name, value in snapshot(model).items():
            path[name].append(value)
    found = averages(model, optimizer)
    slow = reference.average_of_path(path["0.weight"], MISSED_BETA, 10.0)
    torch.testing.assert_close(found["0.weight"], slow, rtol=1e-9, atol=1e-11)


def test_networks_of_small_weights_have_their_own_share_and_sharpness(make_model, doubles) -> None:
    model = make_model(torch.float64)
    for layer in (model[2], model[4]):
        layer.weight.data.mul_(0.1)
    optimizer = GMNOptimizer(model)  # whose learned beta is another
    path = path_of(model, optimizer, doubles)
    slow = reference.average_of_path(path["0.weight"], 0.8, SMALL_SHARPNESS)
    torch.testing.assert_close(averages(model, optimizer)["0.weight"], slow, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_way_back_is_bit_by_bit(make_model, batches, arm, dtype) -> None:
    model, twin, batches = make_model(dtype), make_model(dtype), [batch.to(dtype) for batch in batches]
    optimizer, other = optimizer_for(model, arm), optimizer_for(twin, arm)
    for batch in batches:
        optimizer.train()
        train(model, optimizer, [batch])
        optimizer.eval()
        optimizer.eval()
        model(batch)
    optimizer.train()
    train(twin, other, batches)
    assert_same(model, twin)
    assert_equal_states(optimizer.state_dict(), other.state_dict())


@pytest.mark.parametrize("arm", PLAIN)
def test_where_steps_are_not_averaged_parameters_stay(make_model, batches, arm: str) -> None:
    model = make_model()
    optimizer = optimizer_for(model, arm)
    train(model, optimizer, batches)
    assert_same(model, averages(model, optimizer))


def test_before_the_first_step_parameters_stay(make_model) -> None:
    model = make_model()
    assert_same(model, averages(model, GMNOptimizer(model)))


@pytest.mark.parametrize("arm", ["controller", "adam"])
def test_a_step_after_eval_is_refused_and_changes_nothing(make_model, batches, arm: str) -> None:
    model, calls = make_model(), []
    optimizer = optimizer_for(model, arm)
    train(model, optimizer, batches)
    loss_of(model, batches[0]).backward()
    optimizer.eval()
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict())
    for closure in (None, partial(calls.append, 1)):
        with pytest.raises(EvaluationModeError, match=r"step\(\) was called after eval\(\).*call train\(\)"):
            optimizer.step(closure)
    assert not calls
    assert_same(model, before)
    assert_equal_states(optimizer.state_dict(), state)


COPIES: dict[str, Callable[[GMNOptimizer, nn.Module], tuple[nn.Module, GMNOptimizer]]] = {
    "deepcopy": lambda optimizer, model: copy.deepcopy((model, optimizer)),
    "pickle": lambda optimizer, model: pickle.loads(pickle.dumps((model, optimizer))),
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_made_in_evaluation_find_the_way_back(make_model, batches, duplicate) -> None:
    model, twin = make_model(), make_model()
    optimizer, other = GMNOptimizer(model), GMNOptimizer(twin)
    train(model, optimizer, batches[:6])
    train(twin, other, batches)
    optimizer.eval()
    again, reloaded = duplicate(optimizer, model)
    with pytest.raises(EvaluationModeError):
        reloaded.step()
    for each, own in ((model, optimizer), (again, reloaded)):
        own.train()
        train(each, own, batches[6:])
        assert_same(each, twin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_saved_in_evaluation_goes_on_as_if_it_had_not_been(make_model, batches, dtype) -> None:
    batches = [batch.to(dtype) for batch in batches]
    model, twin, loaded = make_model(dtype), make_model(dtype), make_model(dtype, seed=1)
    optimizer, other, reloaded = (GMNOptimizer(each) for each in (model, twin, loaded))
    train(model, optimizer, batches[:6])
    train(twin, other, batches)
    optimizer.eval()
    loaded.load_state_dict(saved_and_loaded(model.state_dict()))
    reloaded.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert_same(loaded, model)
    with pytest.raises(EvaluationModeError):
        reloaded.step()
    reloaded.train()
    train(loaded, reloaded, batches[6:])
    assert_same(loaded, twin)
    assert_equal_states(reloaded.state_dict(), other.state_dict())


def test_averages_of_a_state_that_was_loaded_need_no_step(make_model, batches) -> None:
    model, loaded = make_model(), make_model(seed=1)
    optimizer, reloaded = GMNOptimizer(model), GMNOptimizer(loaded)
    train(model, optimizer, batches)
    loaded.load_state_dict(model.state_dict())
    reloaded.load_state_dict(optimizer.state_dict())
    assert_same(loaded, model)
    found = averages(model, optimizer)
    assert distance(model, found) > 0
    assert averages(loaded, reloaded).keys() == found.keys()
    reloaded.eval()
    assert_same(loaded, found)


def test_a_state_of_an_older_version_has_averages_after_its_next_step(make_model, batches) -> None:
    model = make_model()
    optimizer = GMNOptimizer(model)
    train(model, optimizer, batches[:6])
    state = copy.deepcopy(optimizer.state_dict())
    for entries in state["state"].values():
        del entries["average_share"]
    optimizer.load_state_dict(state)
    with pytest.warns(UserWarning, match="of an older version.*known after the next step"):
        assert_same(model, averages(model, optimizer))
    train(model, optimizer, batches[6:7])
    assert distance(model, averages(model, optimizer)) > 0


WRITTEN: dict[str, Callable[[nn.Linear], object]] = {
    "load_state_dict": lambda layer: layer.load_state_dict({"weight": torch.ones(7, 5), "bias": torch.ones(7)}),
    "data": lambda layer: [parameter.data.fill_(1.0) for parameter in layer.parameters()],
    "other data": lambda layer: setattr(layer.weight, "data", torch.ones(7, 5)),
    "another shape": lambda layer: setattr(layer.weight, "data", torch.ones(3)),
}


@pytest.mark.parametrize("write", WRITTEN.values(), ids=WRITTEN)
@pytest.mark.parametrize("is_copied", [False, True])
def test_values_that_the_user_put_there_since_stay(make_model, batches, write, is_copied) -> None:
    model = make_model()
    optimizer = GMNOptimizer(model)
    train(model, optimizer, batches)
    before = snapshot(model)
    optimizer.eval()
    write(model[0])
    if is_copied:
        model, optimizer = copy.deepcopy((model, optimizer))
    optimizer.train()
    assert (model[0].weight == 1).all()
    assert torch.equal(model[2].weight, before["2.weight"])
    assert not any("trained" in entries or "ahead" in entries for entries in optimizer.state.values())


def test_a_pass_that_renorms_some_rows_of_a_table_changes_these_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4, max_norm=0.5), nn.Linear(4, 2))
    optimizer = GMNOptimizer(model)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.arange(10)).square().mean().backward()
        optimizer.step()
    before = snapshot(model)
    optimizer.eval()
    model[0].weight.data[:3] *= 9
    with torch.no_grad():
        model(torch.arange(3))
    optimizer.train()
    assert torch.equal(model[0].weight[3:], before["0.weight"][3:])
    torch.testing.assert_close(model[0].weight[:3].norm(dim=1), 0.5 * torch.ones(3), rtol=1e-4, atol=0)
    assert torch.equal(model[1].weight, before["1.weight"])


@pytest.mark.parametrize("fails_at", [1, 3])
@pytest.mark.parametrize("verb", ["eval", "train"])
def test_what_fails_half_way_loses_nothing(make_model, batches, monkeypatch, verb, fails_at) -> None:
    model = make_model()
    optimizer = GMNOptimizer(model)
    train(model, optimizer, batches)
    trained, averaged = snapshot(model), averages(model, optimizer)
    if verb == "train":
        optimizer.eval()
    copies, copy_ = [], Tensor.copy_

    def failing(self: Tensor, *arguments: object) -> Tensor:
        copies.append(self)
        if len(copies) == fails_at:
            raise KeyboardInterrupt
        return copy_(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Tensor, "copy_", failing)
        with pytest.raises(KeyboardInterrupt):
            getattr(optimizer, verb)()
    if verb == "eval":
        assert_same(model, trained)
        assert not any("trained" in entries for entries in optimizer.state.values())
        optimizer.eval()
        assert_same(model, averaged)
    optimizer.train()
    assert_same(model, trained)
    train(model, optimizer, batches)


def test_parameters_that_leave_the_groups_go_back_too(make_model, batches) -> None:
    model = make_model()
    optimizer = GMNOptimizer(model, params=[{"params": [*layer.parameters()]} for layer in (model[0], model[2])])
    train(model, optimizer, batches)
    before = snapshot(model)
    optimizer.eval()
    del optimizer.param_groups[1]
    optimizer.train()
    assert_same(model, before)


def test_a_momentum_of_the_group_is_the_share_of_the_average(make_model, doubles) -> None:
    model = make_model(torch.float64)
    rule = make_rule("controller")
    optimizer = GMNOptimizer(model, weights=rule, momentum=0.5)
    path = path_of(model, optimizer, doubles)
    slow = reference.average_of_path(path["2.weight"], 0.5, rule.double().nominal.sharpness().item())
    torch.testing.assert_close(averages(model, optimizer)["2.weight"], slow, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)])
def test_at_lr_zero_parameters_are_their_averages(make_model, batches, lr) -> None:
    model = make_model()
    optimizer = GMNOptimizer(model)
    train(model, optimizer, batches)
    optimizer.param_groups[0]["lr"] = lr
    assert_same(model, averages(model, optimizer))


def test_parameters_without_a_step_are_left_alone(make_model, batches) -> None:
    model = make_model()
    model[0].weight.requires_grad_(False)
    optimizer = GMNOptimizer(model)
    train(model, optimizer, batches)
    found = averages(model, optimizer)
    assert torch.equal(found["0.weight"], model[0].weight)
    assert not torch.equal(found["2.weight"], model[2].weight)


def test_averages_have_less_of_the_noise() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(4_000, 6)
    labels = (inputs @ torch.randn(6, 3)).argmax(1)
    labels = torch.where(torch.rand(4_000) < 0.4, torch.randint(0, 3, (4_000,)), labels)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer, losses = GMNOptimizer(model), []
    for number in range(200):
        chosen = torch.randint(0, 2_000, (32,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[chosen]), labels[chosen]).backward()
        optimizer.step()
        if number >= 100:
            held_out = partial(nn.functional.cross_entropy, target=labels[2_000:])
            pair = [held_out(model(inputs[2_000:])).item()]
            optimizer.eval()
            pair.append(held_out(model(inputs[2_000:])).item())
            optimizer.train()
            losses.append(pair)
    trained, averaged = torch.tensor(losses).mean(0).tolist()
    assert averaged < trained - 0.002
