"""Which parameters the learned term serves, in models of all kinds, and that passes and models do not get mixed up."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from gmn_optim import CaptureWarning, GMNOptimizer
from gmn_optim.capture.adapters import require_adapter
from tests.cases import (
    ARMS,
    IN_EIGENBASIS,
    LEARNED,
    MODELS,
    SOME,
    WARNING_MODELS,
    WITH_FACTORS,
    Attention,
    assert_same,
    loss_of,
    make_case,
    make_rule,
    optimizer_for,
    snapshot,
    train,
    without_learned_term,
)
from tests.tables import LAYERS

CLOSE = {"rtol": 1e-9, "atol": 1e-12}


@pytest.mark.parametrize("case", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("arm", SOME)
def test_the_learned_term_serves_what_it_can_and_says_why_not(case, arm) -> None:
    model, batches = make_case(case, 4)
    optimizer = optimizer_for(model, arm)
    train(model, optimizer, batches)
    config = ARMS[arm]
    every = {name for name, parameter in model.named_parameters()}
    wanted = set(case.learned) if config.gradmetanet else every if config.body else set()
    rows = {row.parameter: row for row in optimizer.summary().rows}
    assert {name for name, row in rows.items() if row.updated_by == config.arm and config.body} == wanted
    assert {row.updated_by for name, row in rows.items() if name not in wanted} <= {config.nominal}
    assert all(row.because for row in rows.values())
    assert all(parameter.isfinite().all() for parameter in model.parameters())


SERVED_IN_EIGENBASIS = {
    "relu": {"0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"},
    "no biases": {"0.weight", "2.weight"},
    "layer norm": {"0.weight", "0.bias", "2.weight", "2.bias"},
    "batch norm": {"0.weight", "0.bias", "2.weight", "2.bias"},
    "convolution": {"0.weight", "0.bias", "3.weight", "3.bias"},
    "embedding": {"2.weight", "2.bias"},
    "loose": {"layer.weight", "layer.bias"},
    "tied": {"first.weight", "last.weight", "last.bias"},
    "mixed kinds": {"last.weight", "last.bias"},
    "bags": {"2.weight", "2.bias"},
}


@pytest.mark.parametrize("name", SERVED_IN_EIGENBASIS)
@pytest.mark.parametrize("arm", IN_EIGENBASIS)
def test_in_the_eigenbasis_the_summary_names_those_whose_steps_the_learned_term_changes(arm, name) -> None:
    model, batches = make_case(MODELS[name], 1)
    model, batches = model.double(), [b.double() if b.is_floating_point() else b for b in batches]
    twin, rule = copy.deepcopy(model), make_rule(arm)
    optimizer = GMNOptimizer(model, weights=rule)
    train(model, optimizer, batches)
    train(twin, GMNOptimizer(twin, weights=without_learned_term(rule)), batches)
    changed = {each for each, value in snapshot(model).items() if not torch.equal(value, snapshot(twin)[each])}
    rows = {row.parameter: row for row in optimizer.summary().rows}
    served = {each for each, row in rows.items() if row.updated_by == ARMS[arm].arm}
    assert changed == served == SERVED_IN_EIGENBASIS[name]
    assert {row.updated_by for each, row in rows.items() if each not in served} <= {ARMS[arm].nominal}
    sizes = {each: parameter.numel() for each, parameter in model.named_parameters()}
    assert optimizer.stats().served_share == sum(sizes[each] for each in served) / sum(sizes.values())


@pytest.mark.parametrize("arm", IN_EIGENBASIS)
def test_in_the_eigenbasis_the_summary_says_why_others_get_the_nominal_term(arm) -> None:
    model, batches = make_case(MODELS["bags"], 1)
    optimizer = optimizer_for(model, arm)
    train(model, optimizer, batches)
    reasons = {row.parameter: row.because.split(";")[0] for row in optimizer.summary().rows}
    assert reasons["0.weight"] == reasons["1.weight"] == "the learned term serves matrices alone, each with its bias"
    assert reasons["2.bias"] == "its factors explain its gradient"
    optimizer.close()
    assert {row.because.split(";")[0] for row in optimizer.summary().rows} == {"the optimizer is closed"}
    assert optimizer.stats().served_share == 0.0


@pytest.mark.parametrize("arm", IN_EIGENBASIS)
def test_in_the_eigenbasis_a_bias_with_a_momentum_of_its_own_is_not_served(make_model, doubles, arm) -> None:
    model = make_model(torch.float64)
    weights, biases = ([p for p in model.parameters() if p.dim() == dims] for dims in (2, 1))
    optimizer = optimizer_for(model, arm, params=[{"params": weights}, {"params": biases, "momentum": 0.7}])
    train(model, optimizer, doubles[:2])
    served = {row.parameter for row in optimizer.summary().rows if row.updated_by == ARMS[arm].arm}
    assert served == {"0.weight", "2.weight", "4.weight"}


VARIANTS = [
    pytest.param(kind, variant, id=f"{kind.__name__} {variant}")
    for kind, case in LAYERS.items()
    for variant in case.variants
]


@pytest.mark.parametrize(("kind", "variant"), VARIANTS)
@pytest.mark.parametrize("arm", ["slots", "moments"])
def test_the_learned_term_serves_every_layer_kind(kind, variant, arm) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[kind].variants[variant]().double(), LAYERS[kind].draw(LAYERS[kind].shapes[0])
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    twin, rule = copy.deepcopy(layer), make_rule(arm)
    for each, its_rule in ((layer, rule), (twin, without_learned_term(rule))):
        train(each, GMNOptimizer(each, weights=its_rule), [x])
    adapter, plain = require_adapter(layer), snapshot(twin)
    for name, value in snapshot(layer).items():
        assert torch.equal(value, plain[name]) == (name not in adapter.roles()) and value.isfinite().all()


@pytest.mark.parametrize("case", MODELS.values(), ids=MODELS)
def test_parameters_without_factors_get_exactly_the_nominal_term(case) -> None:
    model, batches = make_case(case, 1)
    twin, rule = copy.deepcopy(model), make_rule("moments")
    for each, its_rule in ((model, rule), (twin, without_learned_term(rule))):
        torch.manual_seed(0)
        train(each, GMNOptimizer(each, weights=its_rule), batches)
    plain = snapshot(twin)
    for name, value in snapshot(model).items():
        assert torch.equal(value, plain[name]) == (name not in case.learned), name


@pytest.mark.parametrize(
    ("name", "parameter", "words"),
    [
        ("layer norm", "1.weight", "its factors explain its gradient"),
        ("batch norm", "1.bias", "its factors explain its gradient"),
        ("batch norm", "0.bias", "its gradient is zero up to rounding"),
        ("language model", "blocks.0.attention.k.bias", "its gradient is zero up to rounding"),
        ("residual convolutions", "conv1.bias", "its gradient is zero up to rounding"),
        ("convolution", "0.weight", "its factors explain its gradient"),
        ("embedding", "0.weight", "its factors explain its gradient"),
        ("tied embedding", "table.weight", "its factors explain its gradient"),
        ("upsampling", "up.weight", "its factors explain its gradient"),
        ("upsampling", "up.bias", "the factors of its layer do not give its gradient"),
        ("tied", "second.bias", "its layer's weight is shared, parametrized or stored otherwise"),
        ("mixed kinds", "first.weight", "its layer's weight is shared, parametrized or stored otherwise"),
        ("vision model", "token", "no adapter serves ViT"),
        ("relu", "0.weight", "its factors explain its gradient"),
    ],
)
def test_the_summary_gives_the_reason(name, parameter, words) -> None:
    model, batches = make_case(MODELS[name], 1)
    optimizer = optimizer_for(model, "slots")
    train(model, optimizer, batches)
    (row,) = [row for row in optimizer.summary().rows if row.parameter == parameter]
    assert row.because == words
    assert row.shape == tuple(model.get_parameter(parameter).shape) and f"{parameter} " in str(optimizer.summary())


@pytest.mark.parametrize(("name", "words"), [("penalized", "'last'")])
def test_a_layer_that_cannot_be_explained_is_named_once(name, words) -> None:
    case = WARNING_MODELS[name]
    model, batches = make_case(case, 5)
    optimizer = optimizer_for(model, "slots")
    with pytest.warns(CaptureWarning, match=words) as caught:
        train(model, optimizer, batches)
    assert len(caught) == 1
    rows = {row.parameter: row for row in optimizer.summary().rows}
    assert {name for name, row in rows.items() if row.updated_by.endswith("gmn")} == set(case.learned)
    assert all(row.because for row in rows.values())


@pytest.mark.parametrize("size", [1, 3, 17])
@pytest.mark.parametrize("arm", SOME)
def test_the_batch_size_may_change_from_step_to_step(make_model, arm, size) -> None:
    torch.manual_seed(0)
    model = make_model()
    optimizer = optimizer_for(model, arm)
    train(model, optimizer, [torch.randn(n, 5) for n in (8, 8, size, 8, size, 1)])
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert optimizer.stats().served_share == (arm in LEARNED)


def test_a_last_partial_batch_keeps_the_state(make_model, batches, arm) -> None:
    model = make_model()
    optimizer = optimizer_for(model, arm)
    train(model, optimizer, batches[:3])
    before = copy.deepcopy(optimizer.state_dict()["state"])
    train(model, optimizer, [batches[3][:3]])
    for number, entries in optimizer.state_dict()["state"].items():
        assert entries.keys() == before[number].keys()
        assert entries["step"].item() == 4
        assert all(value.shape == before[number][key].shape for key, value in entries.items())


def test_several_forward_passes_equal_one_of_all_data_points(make_model, doubles, arm) -> None:
    model, twin = make_model(torch.float64), make_model(torch.float64)
    several, one = optimizer_for(model, arm), optimizer_for(twin, arm)
    for batch in doubles[:5]:
        several.zero_grad()
        (sum(loss_of(model, part) for part in batch.split(4)) / 2).backward()
        several.step()
        train(twin, one, [batch])
    assert_same(model, twin, **CLOSE)


def test_evaluation_between_steps_changes_nothing(make_model, batches, arm) -> None:
    model, twin = make_model(), make_model()
    optimizer = optimizer_for(model, arm)
    for batch in batches:
        train(model, optimizer, [batch])
        with torch.no_grad():
            model(batches[0])
        model.eval()
        model(batches[1])
        model.train()
    train(twin, optimizer_for(twin, arm), batches)
    assert_same(model, twin)


def test_a_model_in_eval_mode_trains(make_model, batches, arm) -> None:
    model, twin = make_model(), make_model()
    model.eval()
    train(model, optimizer_for(model, arm), batches)
    train(twin, optimizer_for(twin, arm), batches)
    assert_same(model, twin)


def test_layers_are_frozen_and_unfrozen_between_steps(make_model, batches, arm) -> None:
    model = make_model()
    optimizer = optimizer_for(model, arm)
    for number, batch in enumerate(batches):
        model[2].requires_grad_(number not in (3, 4, 5))
        before = snapshot(model)
        train(model, optimizer, [batch])
        moved = {name for name, value in snapshot(model).items() if not torch.equal(value, before[name])}
        assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert optimizer.state[model[2].weight]["step"].item() == 9
    assert optimizer.state[model[0].weight]["step"].item() == 12
    assert optimizer.stats().served_share == (arm in LEARNED)


@pytest.mark.parametrize("role", ["weight", "bias"])
@pytest.mark.parametrize("arm", SOME)
def test_half_a_layer_may_be_frozen(make_model, batches, arm, role) -> None:
    model = make_model()
    model[2].get_parameter(role).requires_grad_(False)
    before = snapshot(model)
    optimizer = optimizer_for(model, arm)
    train(model, optimizer, batches)
    moved = {name for name, value in snapshot(model).items() if not torch.equal(value, before[name])}
    assert moved == set(before) - {f"2.{role}"}
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_frozen_parameters_are_named_frozen(make_model) -> None:
    model = make_model()
    model[0].requires_grad_(False)
    rows = optimizer_for(model, "slots").summary().rows
    assert [row.because for row in rows][:2] == ["frozen", "frozen"]


WAYS_TO_NAME = {
    "by default": (lambda module: None, lambda module: module.parameters()),
    "unnamed": (lambda module: module.parameters(), lambda module: module.parameters()),
    "named": (lambda module: module.named_parameters(), lambda module: module.named_parameters()),
}


@pytest.mark.parametrize(("of_model", "of_layer"), WAYS_TO_NAME.values(), ids=WAYS_TO_NAME)
@pytest.mark.parametrize("arm", SOME)
def test_layers_may_be_added_later(make_model, batches, arm, of_model, of_layer) -> None:
    model = make_model()
    optimizer = optimizer_for(model, arm, params=of_model(model))
    train(model, optimizer, batches[:3])
    added = nn.Linear(3, 3)
    model.append(nn.Tanh()).append(added)
    optimizer.add_param_group({"params": of_layer(added), "lr": 0.5})
    before = snapshot(model)
    train(model, optimizer, batches[3:])
    assert all(not torch.equal(value, before[name]) for name, value in snapshot(model).items())
    assert optimizer.stats().served_share == (arm in LEARNED)
    assert optimizer.state[added.weight]["step"].item() == len(batches) - 3


def test_a_second_step_on_old_gradients_takes_the_nominal_term_and_says_so(make_model, batches) -> None:
    model = make_model()
    optimizer = optimizer_for(model, "slots")
    train(model, optimizer, batches[:1])
    with pytest.warns(CaptureWarning, match="no hook ran"):
        optimizer.step()
    assert optimizer.stats().served_share == 0.0


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("arm", WITH_FACTORS)
def test_a_limit_on_rows_is_kept_without_complaint(make_model, batches, arm, rows) -> None:
    model = make_model()
    optimizer = optimizer_for(model, arm, rows=rows)
    train(model, optimizer, batches)
    assert optimizer.stats().served_share == 1.0
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_capture_warnings_can_be_silenced() -> None:
    torch.manual_seed(0)
    model = Attention()
    optimizer = optimizer_for(model, "slots")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CaptureWarning)
        train(model, optimizer, [torch.randn(8, 3, 4)])


def test_parameters_of_no_model_get_the_nominal_term(make_model, batches) -> None:
    model, extra = make_model(), nn.Parameter(torch.ones(3))
    optimizer = optimizer_for(model, "slots", params=[*model.parameters(), extra])
    for batch in batches[:2]:
        optimizer.zero_grad()
        (loss_of(model, batch) + _pull(extra)).backward()
        optimizer.step()
    row = optimizer.summary().rows[-1]
    assert row.layer == "(outside the model)" and row.updated_by == "momentum"
    assert row.because == "not a parameter of the model" and not torch.equal(extra, torch.ones(3))


def _pull(values: Tensor) -> Tensor:
    """Return a loss () of some values."""
    return values.square().sum()
