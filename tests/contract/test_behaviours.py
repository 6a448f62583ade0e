"""What PyTorch's own test-suite asks of every optimizer, where no other test of ours asks it already.

Each is tried on a small network and, as torch does, on loose parameters, which get the nominal term.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from gmn_optim import GMNOptimizer
from tests.cases import (
    SOME,
    assert_equal_states,
    assert_same,
    make_rule,
    optimizer_for,
    snapshot,
)

EXACT = {"rtol": 1e-12, "atol": 1e-14}


class Loose(nn.Module):
    """A weight and a bias without a layer; sliced ones are every second element of larger tensors."""

    def __init__(self, is_sliced: bool = False) -> None:
        super().__init__()
        weight, bias = torch.randn(10, 5, 2), torch.randn(10, 2)
        self.weight = nn.Parameter(weight[..., 0] if is_sliced else weight[..., 0].contiguous())
        self.bias = nn.Parameter(bias[..., 0] if is_sliced else bias[..., 0].contiguous())

    def forward(self, inputs: Tensor) -> Tensor:
        """Return outputs (10)."""
        return self.weight.mv(inputs) + self.bias


MODELS: dict[str, Callable[[], nn.Module]] = {
    "loose parameters": Loose,
    "sliced parameters": lambda: Loose(is_sliced=True),
    "layer": lambda: nn.Sequential(nn.Linear(5, 10)),
    "network": lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lr": {"lr": 0.5},
    "tensor lr": {"lr": torch.tensor(0.5)},
    "weight decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.5},
    "maximize": {"maximize": True},
    "maximize with weight decay": {"maximize": True, "weight_decay": 0.01},
}

Schedulers = Sequence[Callable[[torch.optim.Optimizer], Any]]

SCHEDULERS: dict[str, Schedulers] = {
    "StepLR": [lambda optimizer: lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.9)],
    "ExponentialLR and ReduceLROnPlateau": [
        lambda optimizer: lr_scheduler.ExponentialLR(optimizer, gamma=0.95),
        lr_scheduler.ReduceLROnPlateau,
    ],
    "LinearLR and StepLR": [
        lambda optimizer: lr_scheduler.LinearLR(optimizer, start_factor=0.4, total_iters=4),
        lambda optimizer: lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.9),
    ],
}


@pytest.fixture(params=MODELS.values(), ids=list(MODELS))
def model(request: pytest.FixtureRequest) -> nn.Module:
    """Return every model in turn."""
    torch.manual_seed(0)
    return request.param()


def groups_of(model: nn.Module, of_weights: dict[str, Any], of_biases: dict[str, Any]) -> list[dict[str, Any]]:
    """Return two groups with options of their own: weights and biases."""
    named = dict(model.named_parameters())
    return [
        {"params": [value for name, value in named.items() if name.endswith(role)], **options}
        for role, options in (("weight", of_weights), ("bias", of_biases))
    ]


def loss_of(model: nn.Module) -> Tensor:
    """Return the loss () of one data point, always the same."""
    return model(torch.linspace(-1.0, 1.5, 5, dtype=next(model.parameters()).dtype)).square().sum()


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Take one step; return the loss before it."""
    optimizer.zero_grad()
    loss = loss_of(model)
    loss.backward()
    optimizer.step()
    return loss.item()


def run(model: nn.Module, optimizer: torch.optim.Optimizer, schedulers: Schedulers = ()) -> float:
    """Take twenty steps; return the ratio of the loss after them to the loss before."""
    made = [scheduler(optimizer) for scheduler in schedulers]
    before = loss_of(model).item()
    for _ in range(20):
        loss = step(model, optimizer)
        for scheduler in made:
            scheduler.step(*[loss] * isinstance(scheduler, lr_scheduler.ReduceLROnPlateau))
    return loss_of(model).item() / before


def test_sliced_parameters_are_not_contiguous() -> None:
    assert not any(parameter.is_contiguous() for parameter in MODELS["sliced parameters"]().parameters())


# ---------------------------------------------------------------------- direction


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("arm", SOME)
def test_twenty_steps_go_in_the_right_direction(model, arm, options) -> None:
    ratio = run(model, optimizer_for(model, arm, **copy.deepcopy(options)))
    assert ratio > 1.0 if options.get("maximize") else ratio < 1.0


@pytest.mark.parametrize("schedulers", SCHEDULERS.values(), ids=list(SCHEDULERS))
@pytest.mark.parametrize("lr", [1.0, torch.tensor(1.0)], ids=["number", "tensor"])
@pytest.mark.parametrize("arm", SOME)
def test_twenty_scheduled_steps_go_in_the_right_direction(model, arm, lr, schedulers) -> None:
    optimizer = optimizer_for(model, arm, lr=copy.deepcopy(lr))
    assert run(model, optimizer, schedulers) < 1.0
    assert optimizer.param_groups[0]["lr"] < 1.0


@pytest.mark.parametrize("schedulers", SCHEDULERS.values(), ids=list(SCHEDULERS))
@pytest.mark.parametrize("arm", SOME)
def test_groups_under_schedulers_go_in_the_right_direction(model, arm, schedulers) -> None:
    optimizer = optimizer_for(model, arm, params=groups_of(model, {}, {"lr": 0.1}))
    assert run(model, optimizer, schedulers) < 1.0
    assert optimizer.param_groups[0]["lr"] == pytest.approx(10 * optimizer.param_groups[1]["lr"])


@pytest.mark.parametrize("is_climbing", [False, True], ids=["descending", "climbing"])
@pytest.mark.parametrize("arm", SOME)
def test_groups_with_weight_decay_go_in_the_right_direction(model, arm, is_climbing) -> None:
    groups = groups_of(model, {"weight_decay": 0.1}, {"weight_decay": 0.0})
    ratio = run(model, optimizer_for(model, arm, params=groups, maximize=is_climbing))
    assert ratio > 1.0 if is_climbing else ratio < 1.0


@pytest.mark.parametrize("arm", SOME)
def test_a_group_with_a_tiny_lr_stays_while_the_others_go_in_the_right_direction(model, arm) -> None:
    aside = nn.Parameter(torch.randn(2))
    before = aside.detach().clone()
    groups = [{"params": list(model.parameters()), "lr": 1.0}, {"params": [aside]}]
    optimizer = optimizer_for(model, arm, params=groups, lr=1e-28)
    start = loss_of(model).item()
    for _ in range(20):
        optimizer.zero_grad()
        aside.grad = torch.rand_like(aside)
        loss_of(model).backward()
        optimizer.step()
    assert loss_of(model).item() < start and torch.equal(aside, before)


# ---------------------------------------------------------------------- gradients that are absent or zero


def test_parameters_that_need_no_gradient_are_left_alone(model, arm) -> None:
    model.requires_grad_(False)
    before = snapshot(model)
    optimizer = optimizer_for(model, arm, weight_decay=0.1)
    loss = torch.ones(1)
    assert optimizer.step(lambda: loss) is loss
    assert_same(model, before)
    assert not optimizer.state


def test_zero_gradients_of_loose_parameters_move_nothing(arm) -> None:
    torch.manual_seed(0)
    model = Loose()
    before = snapshot(model)
    optimizer = optimizer_for(model, arm)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert_same(model, before)


# ---------------------------------------------------------------------- many parameters at once

REFERENCES = {
    "adam": (0.0, lambda params: torch.optim.Adam(params, lr=0.02, foreach=False)),
    "adam with weight decay": (0.1, lambda params: torch.optim.AdamW(params, lr=0.02, weight_decay=0.1, foreach=False)),
    "momentum": (0.0, lambda params: torch.optim.SGD(params, lr=0.002, momentum=0.9, foreach=False)),
}


def sigmoid_network() -> tuple[nn.Sequential, nn.Parameter]:
    """Return a network in float64, and a parameter without an axis beside it."""
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid())
    return layers.double(), nn.Parameter(torch.tensor(0.3, dtype=torch.float64))


@pytest.mark.parametrize(("decay", "reference"), REFERENCES.values(), ids=list(REFERENCES))
def test_steps_equal_torchs_loop_through_frozen_layers_and_missing_gradients(decay, reference) -> None:
    (model, aside), (twin, beside) = sigmoid_network(), sigmoid_network()
    nominal = "momentum" if reference is REFERENCES["momentum"][1] else "adam"
    ours = GMNOptimizer(model, [*model.parameters(), aside], weights=None, nominal=nominal, lr=0.02, weight_decay=decay)
    theirs = reference([*twin.parameters(), beside])
    inputs = torch.arange(1, 7, dtype=torch.float64).view(3, 2) / 10
    for number in range(7):
        for each, extra, optimizer in ((model, aside, ours), (twin, beside, theirs)):
            optimizer.zero_grad()
            each[2].requires_grad_(number not in (3, 4))
            if number != 2:
                (each(inputs).sum() + extra.square()).backward()
            optimizer.step()
        assert_same(model, twin, **EXACT)
        torch.testing.assert_close(aside, beside, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_default_dtype_set_later_is_immaterial(arm, dtype) -> None:
    rule, trained = make_rule(arm), []
    for default in (torch.float32, dtype):
        (model, aside) = sigmoid_network()
        try:
            torch.set_default_dtype(default)
            optimizer = GMNOptimizer(model, [*model.parameters(), aside], weights=rule)
            for _ in range(7):
                optimizer.zero_grad()
                (model(torch.ones(3, 2, dtype=torch.float64)).sum() + aside.square()).backward()
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        trained.append(model)
        assert {value.dtype for entries in optimizer.state.values() for value in entries.values()} == {torch.float64}
    assert_same(*trained, rtol=1e-6, atol=1e-8)


# ---------------------------------------------------------------------- state


def without_names(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state without the names of parameters, which are not part of what is equal."""
    groups = [{key: value for key, value in group.items() if key != "param_names"} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def given_as(model: nn.Module, is_named: bool) -> list[Any]:
    """Return a model's parameters, with names or without."""
    return list(model.named_parameters() if is_named else model.parameters())


@pytest.mark.parametrize("is_named", [False, True], ids=["saved unnamed", "saved named"])
@pytest.mark.parametrize("is_loaded_named", [False, True], ids=["loaded unnamed", "loaded named"])
@pytest.mark.parametrize("arm", SOME)
def test_a_loaded_state_continues_to_equal_parameters_and_states(model, arm, is_named, is_loaded_named) -> None:
    optimizer = optimizer_for(model, arm, params=given_as(model, is_named))
    for _ in range(5):
        step(model, optimizer)
    twin = copy.deepcopy(model)
    loaded = optimizer_for(twin, arm, params=given_as(twin, is_loaded_named))
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(5):
        assert step(model, optimizer) == step(twin, loaded)
    assert_same(twin, model)
    assert_equal_states(without_names(loaded.state_dict()), without_names(optimizer.state_dict()))
    last = without_names(loaded.state_dict())["param_groups"][-1]
    loaded.param_groups.extend(loaded.param_groups)
    assert without_names(loaded.state_dict())["param_groups"][-1] == last


def test_every_parameter_that_was_stepped_has_a_state(model, arm) -> None:
    optimizer = optimizer_for(model, arm)
    step(model, optimizer)
    assert set(optimizer.state) == set(model.parameters())
    assert all(optimizer.state[parameter] for parameter in model.parameters())


# ---------------------------------------------------------------------- hooks of states


def test_hooks_of_the_state_dict_may_leave_and_take_entries(model, arm) -> None:
    optimizer = optimizer_for(model, arm)
    step(model, optimizer)
    optimizer.register_state_dict_pre_hook(lambda each: each.state.update(note=1))
    assert optimizer.state_dict()["state"]["note"] == 1
    step(model, optimizer)
    assert optimizer.memory_usage().state > 0

    def take(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "taken": state["state"].pop("note")}

    optimizer.register_state_dict_post_hook(take)
    state = optimizer.state_dict()
    assert "note" not in state["state"] and state["taken"] == 1


def test_hooks_of_loading_run_in_order(model, arm) -> None:
    optimizer = optimizer_for(model, arm)
    step(model, optimizer)

    def set_in_place(_: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        state["param_groups"][0]["lr"] = 0.25

    def replace(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "param_groups": [{**group, "lr": 0.5} for group in state["param_groups"]]}

    optimizer.register_load_state_dict_pre_hook(set_in_place)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.25
    first = optimizer.register_load_state_dict_pre_hook(replace, prepend=True)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.25
    first.remove()
    optimizer.register_load_state_dict_pre_hook(replace)
    optimizer.register_load_state_dict_post_hook(lambda each: each.state.update(seen=each.param_groups[0]["lr"]))
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["lr"] == optimizer.state["seen"] == 0.5
    step(model, optimizer)
    assert optimizer.stats().steps == 2


# ---------------------------------------------------------------------- closures, arguments


@pytest.mark.parametrize("returned", [torch.tensor([10.0]), 10.0, math.inf, None], ids=str)
def test_step_returns_what_the_closure_returned(model, arm, returned) -> None:
    optimizer = optimizer_for(model, arm)
    assert optimizer.step(lambda: returned) is returned
    loss_of(model).backward()
    assert optimizer.step(lambda: returned) is returned


@pytest.mark.parametrize("flag", ["foreach", "fused", "capturable", "differentiable", "betas", "eps", "amsgrad"])
@pytest.mark.parametrize("value", [True, False, None])
def test_arguments_of_other_optimizers_are_unknown(flag, value) -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{flag}'"):
        GMNOptimizer(model, **{flag: value})
    assert not model._forward_hooks


def test_a_group_that_asks_for_nothing_foreign_is_accepted() -> None:
    model = nn.Linear(2, 1)
    group = {"params": model.parameters(), "name": "all", "foreach": None, "fused": False, "eps": 0}
    optimizer = GMNOptimizer(model, [group], weights=None)
    assert optimizer.param_groups[0]["name"] == "all" and optimizer.param_groups[0]["fused"] is False
