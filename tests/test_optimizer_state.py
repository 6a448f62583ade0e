"""State dicts, copies and pickles: whatever continues from them continues as if nothing had happened."""

import copy
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gmn_optim import GMNOptimizer
from tests.cases import (
    MODELS,
    SOME,
    WITH_FACTORS,
    assert_equal_states,
    assert_same,
    make_case,
    make_rule,
    mlp,
    optimizer_for,
    saved_and_loaded,
    train,
)


def resume(model: nn.Module, optimizer: GMNOptimizer, arm: str, **options: Any) -> tuple[nn.Module, GMNOptimizer]:
    """Return another model and optimizer that continue from files of these."""
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    reloaded = optimizer_for(other, arm, **options)
    other.load_state_dict(saved_and_loaded(model.state_dict()))
    reloaded.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    return other, reloaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_saving_and_loading_continues_bit_by_bit(make_model, batches, arm, dtype) -> None:
    model, batches = make_model(dtype), [batch.to(dtype) for batch in batches]
    optimizer = optimizer_for(model, arm, weight_decay=0.01)
    train(model, optimizer, batches[:6])
    other, reloaded = resume(model, optimizer, arm)
    assert_equal_states(reloaded.state_dict(), optimizer.state_dict())
    train(model, optimizer, batches[6:])
    train(other, reloaded, batches[6:])
    assert_same(other, model)
    assert_equal_states(reloaded.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("name", [name for name in MODELS if name != "dropout"])
@pytest.mark.parametrize("arm", WITH_FACTORS)
def test_every_model_resumes_bit_by_bit(arm, name) -> None:
    model, batches = make_case(MODELS[name], 8)
    optimizer = optimizer_for(model, arm)
    train(model, optimizer, batches[:4])
    other, reloaded = resume(model, optimizer, arm)
    train(model, optimizer, batches[4:])
    train(other, reloaded, batches[4:])
    assert_same(other, model)
    assert_equal_states(reloaded.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("name", ["skip connections", "language model", "residual convolutions", "upsampling"])
@pytest.mark.parametrize("arm", ["slots", "moments"])
def test_what_a_stream_lends_is_saved_with_each_of_its_ports(arm, name) -> None:
    model, batches = make_case(MODELS[name], 4)
    optimizer = optimizer_for(model, arm)
    train(model, optimizer, batches)
    borrowed = [
        entries[key]
        for entries in optimizer.state.values()
        for key in ("memory_lent_activations", "memory_lent_backprops")
        if key in entries
    ]
    assert sum(bool(each.any()) for each in borrowed) > 2


@pytest.mark.parametrize("name", ["convolution", "inputs first", "upsampling", "embedding", "tied language model"])
def test_entries_of_the_state_have_the_size_of_their_parameter(name) -> None:
    model, batches = make_case(MODELS[name], 2)
    optimizer = optimizer_for(model, "gated")
    train(model, optimizer, batches)
    for parameter, entries in optimizer.state.items():
        assert entries["nominal_0"].numel() == entries["nominal_1"].numel() == parameter.numel()
        if "averages" in entries:
            assert entries["averages"].numel() == 6 * parameter.numel()
        if parameter.dim() == entries["nominal_0"].dim():
            assert entries["nominal_0"].shape == parameter.shape


class MixedDtypes(nn.Module):
    """A layer in float32 before one in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3).double()

    def forward(self, inputs: Tensor) -> Tensor:
        """Return outputs (b, 3)."""
        return self.last(torch.tanh(self.first(inputs)).double())


def test_a_model_of_mixed_dtypes_resumes_bit_by_bit(batches, arm) -> None:
    torch.manual_seed(0)
    model = MixedDtypes()
    optimizer = optimizer_for(model, arm)
    train(model, optimizer, batches[:6])
    other, reloaded = resume(model, optimizer, arm)
    train(model, optimizer, batches[6:])
    train(other, reloaded, batches[6:])
    assert_same(other, model)


def test_a_run_with_frozen_layers_resumes_bit_by_bit(make_model, batches, arm) -> None:
    model = make_model()
    optimizer = optimizer_for(model, arm)
    model[0].requires_grad_(False)
    train(model, optimizer, batches[:3])
    model[0].requires_grad_(True)
    train(model, optimizer, batches[3:6])
    other, reloaded = resume(model, optimizer, arm)
    train(model, optimizer, batches[6:])
    train(other, reloaded, batches[6:])
    assert_same(other, model)


@pytest.mark.parametrize("options", [dict(lr=torch.tensor(0.5)), dict(momentum=0.5), dict(maximize=True)], ids=str)
def test_options_are_saved_with_the_state(make_model, batches, options) -> None:
    model = make_model()
    optimizer = optimizer_for(model, "slots", **options)
    train(model, optimizer, batches[:4])
    other, reloaded = resume(model, optimizer, "slots")
    train(model, optimizer, batches[4:])
    train(other, reloaded, batches[4:])
    assert_same(other, model)


def test_states_hold_only_tensors_and_groups_only_plain_values(make_model, batches, arm) -> None:
    model = make_model()
    optimizer = optimizer_for(model, arm)
    assert optimizer.state_dict()["state"] == {}
    train(model, optimizer, batches[:2])
    state = optimizer.state_dict()
    assert sorted(state["state"]) == list(range(6)) and sorted(state) == ["param_groups", "state"]
    assert all(type(value) is Tensor for entries in state["state"].values() for value in entries.values())
    plain = (int, float, bool, str, list, type(None))
    assert all(isinstance(value, plain) for group in state["param_groups"] for value in group.values())
    parameters = list(model.parameters())
    assert all(
        optimizer.state[parameters[n]][k] is v for n, entries in state["state"].items() for k, v in entries.items()
    )


@pytest.mark.parametrize("missing", ["maximize", "momentum", "weights", "weight_decay"])
@pytest.mark.parametrize("arm", SOME)
def test_a_state_of_an_older_version_is_filled_up(make_model, batches, arm, missing) -> None:
    model, other = make_model(), make_model()
    optimizer, reloaded = optimizer_for(model, arm), optimizer_for(other, arm)
    train(model, optimizer, batches[:4])
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        del group[missing]
    other.load_state_dict(model.state_dict())
    reloaded.load_state_dict(state)
    train(model, optimizer, batches[4:])
    train(other, reloaded, batches[4:])
    assert_same(other, model)
    assert reloaded.param_groups[0][missing] == optimizer.param_groups[0][missing]


def test_a_shorter_memory_of_an_older_version_is_filled_up(make_model, batches) -> None:
    model, other = make_model(), make_model()
    optimizer, reloaded = optimizer_for(model, "controller"), optimizer_for(other, "controller")
    train(model, optimizer, batches[:4])
    state = copy.deepcopy(optimizer.state_dict())
    for entries in state["state"].values():
        if "basis_memory" in entries:
            entries["basis_memory"] = entries["basis_memory"][:4].clone()
    for entries in optimizer.state.values():
        if "basis_memory" in entries:
            entries["basis_memory"][4:] = 0
    other.load_state_dict(model.state_dict())
    reloaded.load_state_dict(state)
    train(model, optimizer, batches[4:])
    train(other, reloaded, batches[4:])
    assert_same(other, model)
    assert_equal_states(reloaded.state_dict(), optimizer.state_dict())


def test_loading_does_not_change_the_given_dict_now_or_later(make_model, batches, arm) -> None:
    model, other = make_model(), make_model()
    optimizer, reloaded = optimizer_for(model, arm), optimizer_for(other, arm)
    train(model, optimizer, batches[:4])
    given = copy.deepcopy(optimizer.state_dict())
    wanted = copy.deepcopy(given)
    reloaded.load_state_dict(given)
    train(other, reloaded, batches[4:])
    assert_equal_states(given, wanted)


def test_steps_saved_as_numbers_are_read(make_model, batches, arm) -> None:
    model, other = make_model(), make_model()
    optimizer, reloaded = optimizer_for(model, arm), optimizer_for(other, arm)
    train(model, optimizer, batches[:4])
    state = copy.deepcopy(optimizer.state_dict())
    for entries in state["state"].values():
        entries["step"] = entries["step"].item()
    other.load_state_dict(model.state_dict())
    reloaded.load_state_dict(state)
    train(model, optimizer, batches[4:])
    train(other, reloaded, batches[4:])
    assert_same(other, model)


@pytest.mark.parametrize("is_named", [(True, False), (False, True), (True, True)], ids=["to plain", "to named", "both"])
@pytest.mark.parametrize("arm", SOME)
def test_named_and_unnamed_states_are_exchanged(make_model, batches, arm, is_named) -> None:
    model, other = make_model(), make_model()
    optimizer, reloaded = (
        optimizer_for(each, arm, params=list(each.named_parameters() if named else each.parameters()))
        for each, named in zip((model, other), is_named, strict=True)
    )
    train(model, optimizer, batches[:4])
    other.load_state_dict(model.state_dict())
    reloaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert ("param_names" in reloaded.param_groups[0]) == any(is_named)
    train(model, optimizer, batches[4:])
    train(other, reloaded, batches[4:])
    assert_same(other, model)


CLEARINGS = {
    "in place": lambda optimizer: optimizer.state.clear(),
    "anew": lambda optimizer: setattr(optimizer, "state", defaultdict(dict)),
}


@pytest.mark.parametrize("clear", CLEARINGS.values(), ids=CLEARINGS)
@pytest.mark.parametrize("arm", SOME)
def test_an_optimizer_whose_state_is_cleared_starts_anew(make_model, batches, arm, clear) -> None:
    model, other = make_model(), make_model()
    optimizer = optimizer_for(model, arm)
    train(model, optimizer, batches[:4])
    other.load_state_dict(model.state_dict())
    clear(optimizer)
    train(model, optimizer, batches[4:])
    train(other, optimizer_for(other, arm), batches[4:])
    assert_same(model, other)
    assert len(optimizer.state) == 6


def test_entries_of_the_state_may_be_replaced(make_model, batches, arm) -> None:
    model, other = make_model(), make_model()
    optimizer = optimizer_for(model, arm)
    train(model, optimizer, batches[:4])
    for entries in optimizer.state.values():
        for key, value in entries.items():
            entries[key] = value.clone()
    train(model, optimizer, batches[4:])
    train(other, optimizer_for(other, arm), batches)
    assert_same(model, other)
    assert {entries["step"].item() for entries in optimizer.state.values()} == {float(len(batches))}


def test_loading_into_an_optimizer_that_has_stepped_replaces_its_state(make_model, batches, arm) -> None:
    model, other, rule = make_model(), mlp(), make_rule(arm)
    optimizer, reloaded = GMNOptimizer(model, weights=rule), GMNOptimizer(other, weights=rule)
    train(model, optimizer, batches[:4])
    train(other, reloaded, batches[:7])
    other.load_state_dict(model.state_dict())
    reloaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, batches[4:])
    train(other, reloaded, batches[4:])
    assert_same(other, model)


def test_a_loaded_state_is_independent_of_the_optimizer_it_came_from(make_model, batches, arm) -> None:
    model, other = make_model(), make_model()
    optimizer, reloaded = optimizer_for(model, arm), optimizer_for(other, arm)
    train(model, optimizer, batches[:4])
    reloaded.load_state_dict(optimizer.state_dict())
    wanted = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, batches[4:])
    assert_equal_states(reloaded.state_dict(), wanted)


# ---------------------------------------------------------------------- hooks of state dicts


def test_state_dict_hooks_fire(make_model, batches, arm) -> None:
    model, seen = make_model(), []
    optimizer = optimizer_for(model, arm)
    train(model, optimizer, batches[:1])
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("pre"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "note": 1})
    assert optimizer.state_dict()["note"] == 1 and seen == ["pre"]


def test_loading_hooks_may_replace_the_given_dict(make_model, batches, arm) -> None:
    model, other, seen = make_model(), make_model(), []
    optimizer, reloaded = optimizer_for(model, arm), optimizer_for(other, arm)
    train(model, optimizer, batches[:4])
    reloaded.register_load_state_dict_pre_hook(lambda _, state: state["wrapped"])
    reloaded.register_load_state_dict_pre_hook(lambda _, state: seen.append("pre"), prepend=True)
    reloaded.register_load_state_dict_post_hook(lambda _: seen.append("post"))
    reloaded.load_state_dict({"wrapped": optimizer.state_dict()})
    assert seen == ["pre", "post"]
    assert_equal_states(reloaded.state_dict(), optimizer.state_dict())
