"""What cannot be trained is refused with a clear message, and nothing is changed by the attempt."""

import copy
import warnings

import pytest
import torch
from torch import nn

import gmn_optim.weights
from gmn_optim import GMNError, GMNOptimizer, WeightsCard, save_weights
from gmn_optim.errors import (
    InvalidArgumentError,
    InvalidParameterError,
    ModelExpectedError,
    UnknownNameError,
    WeightsError,
)
from tests.cases import (
    assert_equal_states,
    assert_same,
    count_hooks,
    loss_of,
    make_rule,
    optimizer_for,
    snapshot,
    train,
)

NO_MODELS = {
    "generator": lambda model: model.parameters(),
    "list": lambda model: list(model.parameters()),
    "named": lambda model: model.named_parameters(),
    "groups": lambda model: [{"params": model.parameters()}],
    "tensor": lambda model: model[0].weight,
    "None": lambda model: None,
}


@pytest.mark.parametrize("given", NO_MODELS.values(), ids=NO_MODELS)
def test_parameters_instead_of_the_model_are_refused_with_the_fix(make_model, given) -> None:
    model = make_model()
    with pytest.raises(ModelExpectedError, match=r"GMNOptimizer\(model\) instead of") as error:
        GMNOptimizer(given(model), weights=make_rule("slots"))
    assert isinstance(error.value, TypeError) and isinstance(error.value, GMNError)
    assert count_hooks(model) == 0


ODD_PARAMETERS = {
    "complex": lambda: nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64)),
    "sparse": lambda: nn.Parameter(torch.eye(3).to_sparse()),
    "not floating": lambda: nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False),
    "has no values": lambda: nn.Parameter(torch.zeros(2, device="meta")),
}


@pytest.mark.parametrize(("words", "odd"), ODD_PARAMETERS.items(), ids=ODD_PARAMETERS)
def test_parameters_of_odd_kinds_are_refused(make_model, words, odd) -> None:
    model = make_model()
    model.register_parameter("odd", odd())
    with pytest.raises(InvalidParameterError, match=words) as error:
        optimizer_for(model, "slots")
    assert isinstance(error.value, ValueError) and count_hooks(model) == 0


@pytest.mark.parametrize(("words", "odd"), ODD_PARAMETERS.items(), ids=ODD_PARAMETERS)
def test_odd_parameters_that_are_left_out_do_no_harm(make_model, batches, words, odd) -> None:
    model = make_model()
    params = list(model.parameters())
    model.register_parameter("odd", odd())
    train(model, optimizer_for(model, "slots", params=params), batches[:2])


BAD_ARGUMENTS = {
    "negative lr": (dict(lr=-1.0), InvalidArgumentError, "Invalid learning rate: -1"),
    "nan lr": (dict(lr=float("nan")), InvalidArgumentError, "Invalid learning rate: nan"),
    "infinite lr": (dict(lr=float("inf")), InvalidArgumentError, "Invalid learning rate: inf"),
    "negative tensor lr": (dict(lr=torch.tensor(-1.0)), InvalidArgumentError, "Invalid learning rate"),
    "long tensor lr": (dict(lr=torch.ones(2)), InvalidArgumentError, "Tensor lr must be 1-element"),
    "negative decay": (dict(weight_decay=-0.1), InvalidArgumentError, "Invalid weight_decay value: -0.1"),
    "nan decay": (dict(weight_decay=float("nan")), InvalidArgumentError, "Invalid weight_decay"),
    "negative momentum": (dict(momentum=-0.1), InvalidArgumentError, "Invalid momentum value: -0.1"),
    "momentum of one": (dict(momentum=1.0), InvalidArgumentError, "Invalid momentum"),
    "no rows": (dict(rows=0), InvalidArgumentError, "rows"),
    "number as weights": (dict(weights=3), InvalidArgumentError, "weights is 3"),
    "unknown nominal": (dict(weights=None, nominal="adan"), UnknownNameError, "Did you mean 'adam'"),
    "missing file": (dict(weights="nowhere.safetensors"), WeightsError, "nowhere.safetensors does not exist"),
    "no parameters": (dict(params=[]), ValueError, "empty parameter list"),
    "foreign": (dict(params=[nn.Parameter(torch.ones(2))]), InvalidParameterError, "none of the parameters belongs"),
    "bare tensor": (dict(params=nn.Parameter(torch.ones(2))), TypeError, "iterable of Tensors"),
    "not a leaf": (dict(params=[torch.ones(2, requires_grad=True) * 2]), ValueError, "non-leaf"),
    "no tensors": (dict(params=["0.weight"]), TypeError, "can only optimize Tensors"),
}


@pytest.mark.parametrize(("options", "kind", "words"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_arguments_that_make_no_sense_are_refused(make_model, options, kind, words) -> None:
    model = make_model()
    with pytest.raises(kind, match=words):
        GMNOptimizer(model, **{"weights": make_rule("slots"), **options})
    assert count_hooks(model) == 0


BAD_GROUPS = {
    "twice": (lambda model: [{"params": [model[0].weight]}, {"params": [model[0].weight]}], "more than one"),
    "half named": (lambda model: [("w", model[0].weight), model[0].bias], "with/without names"),
    "bad lr": (lambda model: [{"params": model[0].parameters(), "lr": -2.0}], "Invalid learning rate: -2.0"),
    "bad decay": (lambda model: [{"params": model[0].parameters(), "weight_decay": -2.0}], "Invalid weight_decay"),
    "of Adam": (
        lambda model: [{"params": model.parameters(), "betas": (0.9, 0.99)}],
        "no option of GMNOptimizer: betas",
    ),
    "fused": (lambda model: [{"params": model.parameters(), "fused": True}], "no option of GMNOptimizer: fused"),
}


@pytest.mark.parametrize(("groups", "words"), BAD_GROUPS.values(), ids=BAD_GROUPS)
def test_groups_that_make_no_sense_are_refused(make_model, groups, words) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=words):
        optimizer_for(model, "slots", params=groups(model))
    assert count_hooks(model) == 0


BAD_ADDITIONS = {
    **{words: (lambda model, odd=odd: {"params": [odd()]}, words) for words, odd in ODD_PARAMETERS.items()},
    "twice": (lambda model: {"params": [model[0].weight]}, "more than one"),
    "negative lr": (lambda model: {"params": [nn.Parameter(torch.ones(2))], "lr": -1.0}, "Invalid learning rate"),
    "tensor lr": (lambda model: {"params": [nn.Parameter(torch.ones(2))], "lr": torch.ones(2)}, "1-element"),
}


@pytest.mark.parametrize(("group", "words"), BAD_ADDITIONS.values(), ids=BAD_ADDITIONS)
def test_a_refused_group_leaves_the_optimizer_as_it_was(make_model, batches, group, words) -> None:
    model, twin = make_model(), make_model()
    optimizer = optimizer_for(model, "slots", params=list(model.parameters()))
    train(model, optimizer, batches[:3])
    hooks = count_hooks(model)
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group(group(model))
    assert len(optimizer.param_groups) == 1 and count_hooks(model) == hooks
    train(model, optimizer, batches[3:])
    train(twin, optimizer_for(twin, "slots"), batches)
    assert_same(model, twin)


def test_a_parameter_twice_in_a_group_warns_and_is_stepped_once(make_model, batches, arm) -> None:
    model, twin = make_model(), make_model()
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = optimizer_for(model, arm, params=[*model.parameters(), model[0].weight])
    train(model, optimizer, batches[:3])
    train(twin, optimizer_for(twin, arm), batches[:3])
    assert_same(model, twin, rtol=1e-4, atol=1e-5)


def test_an_unknown_weights_name_lists_near_matches(make_model, monkeypatch, tmp_path) -> None:
    rule = make_rule("slots")
    card = WeightsCard(name="fashion-mnist-mlp.gmn", description="A test.", rule=rule.config.to_dict())
    save_weights(rule, card, tmp_path)
    monkeypatch.setattr(gmn_optim.weights, "_pretrained_folder", lambda: tmp_path)
    model = make_model()
    with pytest.raises(UnknownNameError, match="Did you mean 'fashion-mnist-mlp.gmn'") as error:
        GMNOptimizer(model, weights="fashion-mnist-mpl.gnm")
    assert isinstance(error.value, KeyError) and count_hooks(model) == 0
    assert GMNOptimizer(model, weights="fashion-mnist-mlp.gmn").summary().rows


@pytest.mark.parametrize("layout", ["sparse", "dense"])
def test_sparse_gradients_are_refused_and_change_nothing(arm, layout) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4, sparse=layout == "sparse"), nn.Flatten(), nn.Linear(12, 3))
    optimizer = optimizer_for(model, arm)
    before, tokens = snapshot(model), torch.randint(0, 9, (8, 3))
    if layout == "dense":
        train(model, optimizer, [tokens])
        return
    with pytest.raises(InvalidParameterError, match="0.weight are sparse; make their layers with sparse=False"):
        train(model, optimizer, [tokens])
    assert_same(model, before)
    assert not optimizer.state and optimizer.stats().steps == 0


BAD_VALUES = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("value", BAD_VALUES)
def test_a_gradient_that_is_not_finite_leaves_its_parameter_alone(make_model, batches, arm, value) -> None:
    model = make_model()
    optimizer = optimizer_for(model, arm)
    train(model, optimizer, batches[:3])
    before, state = snapshot(model), copy.deepcopy(optimizer.state[model[2].weight])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in batches[3:5]:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            model[2].weight.grad[1, 2] = value
            optimizer.step()
    assert (
        sum(
            "'2.weight' is not finite, or its squares are not; the parameter is left" in str(each.message)
            for each in caught
        )
        == 1
    )
    moved = {name for name, each in snapshot(model).items() if not torch.equal(each, before[name])}
    assert moved == set(before) - {"2.weight"}
    assert all(torch.equal(state[key], value) for key, value in optimizer.state[model[2].weight].items())
    assert optimizer.stats().skipped == optimizer.stats().parameters["2.weight"].skipped == 2
    train(model, optimizer, batches[5:])
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert optimizer.state[model[2].weight]["step"].item() == len(batches) - 2


def test_a_loss_that_is_not_finite_does_not_spoil_later_steps(make_model, doubles, arm) -> None:
    model, twin = make_model(torch.float64), make_model(torch.float64)
    optimizer = optimizer_for(model, arm)
    train(model, optimizer, doubles[:3])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, optimizer, [doubles[0] * float("nan")])
    assert optimizer.stats().steps == 3
    train(model, optimizer, doubles[3:])
    train(twin, optimizer_for(twin, arm), doubles)
    assert_same(model, twin)


OTHER_OPTIMIZERS = {
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "RMSprop": torch.optim.RMSprop,
    "Adagrad": torch.optim.Adagrad,
}


@pytest.mark.parametrize("other", OTHER_OPTIMIZERS.values(), ids=OTHER_OPTIMIZERS)
def test_a_state_of_another_optimizer_is_refused(make_model, batches, other) -> None:
    model, twin = make_model(), make_model()
    optimizer, theirs = optimizer_for(model, "moments"), other(twin.parameters())
    train(model, optimizer, batches[:2])
    train(twin, theirs, batches[:2])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(WeightsError, match="made by another optimizer"):
        optimizer.load_state_dict(theirs.state_dict())
    assert_equal_states(optimizer.state_dict(), before)


@pytest.mark.parametrize("arm_loaded", ["momentum", "slots"])
def test_a_state_of_other_weights_is_refused(make_model, batches, arm_loaded) -> None:
    model, other = make_model(), make_model()
    source, target = optimizer_for(model, arm_loaded), optimizer_for(other, "moments")
    train(model, source, batches[:2])
    train(other, target, batches[:2])
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(WeightsError, match="made with weights"):
        target.load_state_dict(source.state_dict())
    torch.testing.assert_close(target.state_dict()["state"], before["state"], rtol=0, atol=0)
