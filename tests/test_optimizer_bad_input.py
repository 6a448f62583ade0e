"""What is unusual but possible has a defined effect: on nothing, on everything, or with a warning that says what.

What is refused outright stands in ``test_optimizer_errors.py``.
"""

import copy
import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from gmn_optim import CaptureWarning, GMNOptimizer
from gmn_optim.capture.verification import Probes
from gmn_optim.errors import InvalidParameterError
from tests.cases import (
    LEARNED,
    SOME,
    WITH_FACTORS,
    assert_equal_states,
    assert_same,
    count_hooks,
    loss_of,
    make_rule,
    optimizer_for,
    snapshot,
    train,
    without_learned_term,
)

EXACT = {"rtol": 1e-12, "atol": 1e-14}
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def moved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Return the names of the parameters that are not what they were."""
    return {name for name, value in snapshot(model).items() if not torch.equal(value, before[name])}


def backward(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
    """Leave the gradients of one batch."""
    optimizer.zero_grad()
    loss_of(model, batch).backward()


def adam_and_ours(model: nn.Module, twin: nn.Module) -> tuple[GMNOptimizer, torch.optim.Adam]:
    """Return our optimizer with Adam alone, and torch's."""
    return GMNOptimizer(model, weights=None, lr=0.02), torch.optim.Adam(twin.parameters(), lr=0.02)


def silenced(action: Callable[[], object]) -> list[warnings.WarningMessage]:
    """Do something that warns; return the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return caught


# ---------------------------------------------------------------------- batches


EMPTY_LOSSES = {
    "sum": lambda model, inputs: model(inputs).sum(),
    "mean": lambda model, inputs: model(inputs).mean(),  # not a number, and its gradients are zero
    "cross entropy": lambda model, inputs: nn.functional.cross_entropy(model(inputs), torch.empty(0, dtype=torch.long)),
}


@pytest.mark.parametrize("loss", EMPTY_LOSSES.values(), ids=EMPTY_LOSSES)
def test_an_empty_batch_is_a_step_on_zero_gradients(make_model, batches, arm, loss) -> None:
    model = make_model()
    before = snapshot(model)
    optimizer = optimizer_for(model, arm)
    loss(model, torch.empty(0, 5)).backward()
    optimizer.step()
    assert_same(model, before)
    train(model, optimizer, batches)
    assert optimizer.stats().steps == len(batches) + 1 and optimizer.stats().skipped == 0
    assert optimizer.stats().served_share == (arm in LEARNED)


def test_an_empty_batch_between_others_does_what_it_does_with_adam(make_model, doubles) -> None:
    model, twin = make_model(torch.float64), make_model(torch.float64)
    for each, optimizer in zip((model, twin), adam_and_ours(model, twin), strict=True):
        for batch in (doubles[0], doubles[1][:0], doubles[2]):
            optimizer.zero_grad()
            each(batch).square().sum().backward()
            optimizer.step()
    assert_same(model, twin, **EXACT)


def test_one_data_point_needs_no_batch_axis(make_model, doubles, arm) -> None:
    model, twin = make_model(torch.float64), make_model(torch.float64)
    optimizer = optimizer_for(model, arm)
    train(model, optimizer, [batch[0] for batch in doubles])
    train(twin, optimizer_for(twin, arm), [batch[:1] for batch in doubles])
    assert_same(model, twin, **CLOSE)
    assert optimizer.stats().served_share == (arm in LEARNED)


# ---------------------------------------------------------------------- numbers that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e32])
def test_a_loss_that_is_not_finite_changes_nothing_and_says_so_once(make_model, batches, arm, value) -> None:
    model = make_model()
    optimizer = optimizer_for(model, arm, weight_decay=0.1)
    train(model, optimizer, batches[:3])
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict())
    caught = silenced(lambda: train(model, optimizer, batches[3:6], scale=value))
    assert {str(each.message) for each in caught} == {
        f"the gradient of {name!r} is not finite, or its squares are not; the parameter is left as it is"
        for name in before
    }
    assert len(caught) == len(before) and not any(issubclass(each.category, CaptureWarning) for each in caught)
    assert_same(model, before)
    assert_equal_states(optimizer.state_dict(), state)
    assert optimizer.stats().steps == 3 and optimizer.stats().skipped == 3 * len(before)


@pytest.mark.parametrize("arm", WITH_FACTORS)
def test_a_loss_that_is_not_finite_does_not_use_up_a_layers_warning(make_model, batches, arm) -> None:
    model = make_model()
    optimizer = optimizer_for(model, arm)
    silenced(lambda: train(model, optimizer, batches[:1], scale=float("nan")))
    backward(model, optimizer, batches[1])
    model[2].weight.grad.normal_()
    with pytest.warns(CaptureWarning, match="layer '2'"):
        optimizer.step()


@pytest.mark.parametrize("arm", WITH_FACTORS)
def test_a_layer_half_of_whose_gradient_is_finite_is_warned_of_for_that_half(make_model, batches, arm) -> None:
    model = make_model()
    optimizer = optimizer_for(model, arm)
    before = snapshot(model)
    backward(model, optimizer, batches[0])
    model[2].weight.grad[0, 0] = float("inf")
    kinds = [each.category for each in silenced(optimizer.step)]
    assert sorted(kinds, key=str) == sorted([UserWarning, CaptureWarning], key=str)
    assert moved(model, before) == set(before) - {"2.weight"}


# ---------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("arm", SOME)
def test_the_loss_falls_in_every_dtype(make_model, batches, arm, dtype) -> None:
    model, batch = make_model(dtype), batches[0].to(dtype)
    optimizer = optimizer_for(model, arm)
    before = loss_of(model, batch).item()
    assert train(model, optimizer, [batch] * 30) < 0.9 * before
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert optimizer.stats().served_share == (arm in LEARNED) and optimizer.stats().skipped == 0


class Cascade(nn.Module):
    """Layers each in a dtype of its own, and casts between."""

    def __init__(self, dtypes: Sequence[torch.dtype]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5, dtype=dtype) for dtype in dtypes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return outputs (b, 5) in float32."""
        for layer in self.layers:
            inputs = torch.tanh(layer(inputs.to(layer.weight.dtype)))
        return inputs.float()


MIXTURES = {
    "three": (torch.float32, torch.float64, torch.bfloat16),
    "halves": (torch.float16, torch.bfloat16),
    "all": (torch.bfloat16, torch.float32, torch.float16, torch.float64),
}


@pytest.mark.parametrize("dtypes", MIXTURES.values(), ids=MIXTURES)
@pytest.mark.parametrize("arm", SOME)
def test_the_loss_falls_in_a_model_of_mixed_dtypes(batches, arm, dtypes) -> None:
    torch.manual_seed(0)
    model = Cascade(dtypes)
    optimizer = optimizer_for(model, arm)
    start, before = snapshot(model), loss_of(model, batches[0]).item()
    assert train(model, optimizer, batches[:1] * 30) < 0.9 * before
    assert moved(model, start) == set(start)
    assert [layer.weight.dtype for layer in model.layers] == list(dtypes)
    assert optimizer.stats().served_share == (arm in LEARNED)


def test_mixed_dtypes_are_stepped_as_by_adam() -> None:
    torch.manual_seed(0)
    model = Cascade(MIXTURES["three"])  # in float16 torch's Adam divides by an epsilon that is zero there
    twin = copy.deepcopy(model)
    batches = list(torch.randn(10, 8, 5))
    for each, optimizer in zip((model, twin), adam_and_ours(model, twin), strict=True):
        train(each, optimizer, batches)
    for layer, other in zip(model.layers, twin.layers, strict=True):
        rounding = torch.finfo(layer.weight.dtype).eps
        # torch keeps averages in the dtype of the parameter; here they are in float64 if any parameter is
        torch.testing.assert_close(layer.weight, other.weight, rtol=0.0, atol=max(20 * rounding, 1e-3))


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 6e-5), (torch.float32, 1e-40)], ids=str)
def test_gradients_that_all_but_vanish_raise_no_false_alarm(dtype, scale) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32, dtype=dtype))
    optimizer = optimizer_for(model, "moments")
    for _ in range(10):
        optimizer.zero_grad()
        (model(torch.randn(128, 64, dtype=dtype)).float().square().mean() * scale).backward()
        optimizer.step()


def test_inputs_across_the_probe_raise_no_false_alarm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8))
    optimizer = optimizer_for(model, "moments", seed=0)
    probe = Probes(0).vector(5, torch.float32, torch.device("cpu"))
    inputs = torch.randn(32, 5)
    loss_of(model, inputs - (inputs @ probe).unsqueeze(1) * probe / 5).backward()
    optimizer.step()


# ---------------------------------------------------------------------- devices


def test_a_model_made_without_values_trains_once_it_has_them(batches, arm) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    with pytest.raises(InvalidParameterError, match=r"has no values .* model.to_empty\(device=...\) first"):
        optimizer_for(model, arm)
    assert count_hooks(model) == 0
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    optimizer, before = optimizer_for(model, arm), snapshot(model)
    train(model, optimizer, batches[:3])
    assert moved(model, before) == set(before)


def test_gradients_on_two_devices_are_refused_and_change_nothing(make_model, batches, arm) -> None:
    model, twin = make_model(), make_model()
    optimizer, elsewhere = optimizer_for(model, arm), nn.Parameter(torch.ones(3, device="meta"))
    train(model, optimizer, batches[:3])
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict())
    backward(model, optimizer, batches[3])
    elsewhere.grad = torch.ones_like(elsewhere)
    optimizer.param_groups[0]["params"].append(elsewhere)
    with pytest.raises(InvalidParameterError, match="with a gradient are on cpu and meta"):
        optimizer.step()
    optimizer.param_groups[0]["params"].pop()
    assert_same(model, before)
    assert_equal_states(optimizer.state_dict(), state)
    optimizer.step()
    train(twin, optimizer_for(twin, arm), batches[:4])
    assert_same(model, twin)


# ---------------------------------------------------------------------- shapes and memory formats


class Loose(nn.Module):
    """Parameters that no layer owns, pulled towards one."""

    def __init__(self, *values: Tensor) -> None:
        super().__init__()
        self.values = nn.ParameterList(values)

    def pull(self) -> Tensor:
        """Return a loss ()."""
        return sum((value - 1.0).square().sum() for value in self.values)


def pull(model: Loose, optimizer: torch.optim.Optimizer, steps: int) -> float:
    """Take some steps; return the last loss."""
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.pull()
        loss.backward()
        optimizer.step()
    return loss.item()


SHAPES = {
    "no axis": [()],
    "one element": [(1,), (1, 1, 1)],
    "no element among others": [(0, 3), (2, 3), (0,)],
    "five axes": [(2, 1, 3, 1, 2)],
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_parameters_of_any_shape_are_stepped_as_by_adam(shapes) -> None:
    torch.manual_seed(0)
    model = Loose(*(torch.randn(shape, dtype=torch.float64) for shape in shapes))
    twin = copy.deepcopy(model)
    ours, theirs = (pull(*pair, 10) for pair in zip((model, twin), adam_and_ours(model, twin), strict=True))
    assert ours == pytest.approx(theirs, rel=1e-12)
    assert_same(model, twin, **EXACT)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_parameters_of_any_shape_descend(arm, shapes) -> None:
    torch.manual_seed(0)
    model = Loose(*(torch.randn(shape) for shape in shapes))
    before = model.pull().item()
    assert pull(model, optimizer_for(model, arm), 50) < before


def test_parameters_without_elements_alone_are_nothing_to_step(arm) -> None:
    model = Loose(torch.empty(0, 3), torch.empty(0))
    optimizer = optimizer_for(model, arm, weight_decay=0.1)
    pull(model, optimizer, 3)
    assert optimizer.stats().steps == 0 and not optimizer.state_dict()["state"]
    assert optimizer.memory_usage().state == 0 and len(optimizer.summary().rows) == 2


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("widths", [(5, 0, 3), (5, 7, 0)], ids=str)
def test_layers_without_neurons_are_passed_over(arm, widths, batches) -> None:
    first, second, third = widths
    model = nn.Sequential(nn.Linear(first, second), nn.ReLU(), nn.Linear(second, third))
    optimizer = optimizer_for(model, arm)
    for batch in batches[:3]:
        optimizer.zero_grad()
        model(batch).sum().backward()
        optimizer.step()
    assert optimizer.stats().steps == 3 and all(parameter.isfinite().all() for parameter in model.parameters())


def _sliced(value: Tensor) -> Tensor:
    """Return the value as every second element of a larger tensor."""
    return torch.stack([value, torch.full_like(value, 7.0)], dim=-1)[..., 0]


LAYOUTS = {
    "sliced": _sliced,
    "transposed": lambda value: value.mT.contiguous().mT,
    "transposed and sliced": lambda value: _sliced(value.mT.contiguous()).mT,
}


@pytest.mark.parametrize("laid_out", LAYOUTS.values(), ids=LAYOUTS)
def test_strides_of_a_weight_are_immaterial_and_kept(make_model, doubles, arm, laid_out) -> None:
    model, twin = make_model(torch.float64), make_model(torch.float64)
    model[2].weight = nn.Parameter(laid_out(model[2].weight.detach()))
    strides = model[2].weight.stride()
    train(model, optimizer_for(model, arm), doubles)
    train(twin, optimizer_for(twin, arm), doubles)
    assert_same(model, twin, **CLOSE)
    assert model[2].weight.stride() == strides and not model[2].weight.is_contiguous()


def test_elements_between_those_of_a_sliced_parameter_stay_as_they_are(arm) -> None:
    whole = torch.ones(4, 3, 2)
    model = Loose(whole[..., 0])
    model.values[0].data = whole[..., 0]
    pull(model, optimizer_for(model, arm, weight_decay=0.1, maximize=True), 3)
    assert torch.equal(whole[..., 1], torch.ones(4, 3))


def test_a_model_may_be_one_layer(arm, doubles) -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    twin = nn.Sequential(copy.deepcopy(model))
    optimizer = optimizer_for(model, arm)
    train(model, optimizer, doubles)
    train(twin, optimizer_for(twin, arm), doubles)
    assert_same(model, snapshot(twin[0]))
    assert optimizer.stats().served_share == (arm in LEARNED)


# ---------------------------------------------------------------------- nothing to train


def test_a_model_that_is_wholly_frozen_is_stepped_without_effect(make_model, batches, arm) -> None:
    model = make_model().requires_grad_(False)
    before = snapshot(model)
    optimizer = optimizer_for(model, arm, weight_decay=0.1)
    model(batches[0])
    assert optimizer.step() is None
    optimizer.zero_grad()
    assert_same(model, before)
    assert not optimizer.state and optimizer.stats().steps == 0 and optimizer.memory_usage().total > 0
    model[0].requires_grad_(True)
    train(model, optimizer, batches[:2])
    assert moved(model, before) == {"0.weight", "0.bias"}


def test_a_model_without_parameters_is_refused_as_torch_refuses_it(arm) -> None:
    model = nn.Sequential(nn.ReLU(), nn.Flatten())
    with pytest.raises(ValueError, match="empty parameter list") as theirs:
        torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match="empty parameter list") as ours:
        optimizer_for(model, arm)
    assert str(ours.value) == str(theirs.value) and count_hooks(model) == 0


# ---------------------------------------------------------------------- frozen and unfrozen midway


@pytest.mark.parametrize("when", ["before the backward pass", "after the backward pass"])
@pytest.mark.parametrize("frozen", ["2.weight", "2"])
def test_what_is_frozen_midway_is_stepped_as_by_adam(make_model, doubles, frozen, when) -> None:
    model, twin = make_model(torch.float64), make_model(torch.float64)
    for each, optimizer in zip((model, twin), adam_and_ours(model, twin), strict=True):
        train(each, optimizer, doubles[:3])
        optimizer.zero_grad()
        loss = loss_of(each, doubles[3])
        if when.startswith("after"):
            loss.backward()
        (each.get_parameter if "weight" in frozen else each.get_submodule)(frozen).requires_grad_(False)
        if when.startswith("before"):
            loss.backward()
        optimizer.step()
    assert_same(model, twin, **EXACT)


def test_a_layer_frozen_after_its_backward_pass_takes_the_nominal_term_once(make_model, batches, arm) -> None:
    model = make_model()
    optimizer = optimizer_for(model, arm)
    train(model, optimizer, batches[:3])
    before = snapshot(model)
    backward(model, optimizer, batches[3])
    model[2].requires_grad_(False)
    optimizer.step()
    assert moved(model, before) == set(before)
    before = snapshot(model)
    train(model, optimizer, batches[4:6])
    assert moved(model, before) == set(before) - {"2.weight", "2.bias"}


@pytest.mark.parametrize("arm", WITH_FACTORS)
def test_a_gradient_that_was_changed_before_its_weight_was_frozen_is_noticed(make_model, batches, arm) -> None:
    model = make_model()
    optimizer = optimizer_for(model, arm)
    backward(model, optimizer, batches[0])
    model[2].weight.grad.normal_()
    model[2].weight.requires_grad_(False)
    with pytest.warns(CaptureWarning, match="layer '2'"):
        optimizer.step()


@pytest.mark.parametrize("arm", SOME)
def test_a_layer_unfrozen_after_the_forward_pass_waits_for_the_next(make_model, batches, arm) -> None:
    model = make_model()
    optimizer = optimizer_for(model, arm)
    model[2].requires_grad_(False)
    before = snapshot(model)
    optimizer.zero_grad()
    loss = loss_of(model, batches[0])
    model[2].requires_grad_(True)
    loss.backward()
    optimizer.step()
    assert moved(model, before) == set(before) - {"2.weight", "2.bias"}
    train(model, optimizer, batches[1:3])
    assert moved(model, before) == set(before)


# ---------------------------------------------------------------------- gradients that no backward pass left


def set_by_hand(model: nn.Module) -> None:
    """Put random gradients in the place of whatever is there."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


@pytest.mark.parametrize("has_factors", [True, False], ids=["with stale factors", "without factors"])
@pytest.mark.parametrize("arm", WITH_FACTORS)
def test_gradients_set_by_hand_take_the_nominal_term_and_it_is_said(make_model, doubles, arm, has_factors) -> None:
    model, twin, rule = make_model(torch.float64), make_model(torch.float64), make_rule(arm)
    optimizer, plain = GMNOptimizer(model, weights=rule), GMNOptimizer(twin, weights=without_learned_term(rule))
    if has_factors:
        backward(model, optimizer, doubles[0])
    for each in (model, twin):
        set_by_hand(each)
    with pytest.warns(CaptureWarning, match="layer '0'.*layer '2'.*layer '4'"):
        optimizer.step()
    silenced(plain.step)
    assert_same(model, twin)
    assert optimizer.stats().served_share == 0.0 and optimizer.memory_usage().factors == 0


def test_gradients_set_by_hand_to_what_they_were_are_served(make_model, batches, arm) -> None:
    model, twin = make_model(), make_model()
    optimizer, other = optimizer_for(model, arm), optimizer_for(twin, arm)
    for batch in batches[:3]:
        backward(model, optimizer, batch)
        for parameter in model.parameters():
            parameter.grad = parameter.grad.clone()
        optimizer.step()
        train(twin, other, [batch])
    assert_same(model, twin)


def test_a_second_step_on_the_same_gradients_is_the_nominal_terms(make_model, doubles, arm) -> None:
    model, twin, rule = make_model(torch.float64), make_model(torch.float64), make_rule(arm)
    optimizer = GMNOptimizer(model, weights=rule)
    train(model, optimizer, doubles[:1])
    start = optimizer.state_dict()
    plain = GMNOptimizer(twin, weights=without_learned_term(rule) if arm in WITH_FACTORS else rule)
    plain.load_state_dict(start)
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        other.data.copy_(parameter)
        other.grad = parameter.grad.clone()
    silenced(optimizer.step)
    silenced(plain.step)
    assert_same(model, twin)
    train(model, optimizer, doubles[1:3])
    assert optimizer.stats().served_share == (arm in LEARNED)


def test_the_warning_of_a_second_step_names_it(make_model, batches) -> None:
    model = make_model()
    optimizer = optimizer_for(model, "slots")
    train(model, optimizer, batches[:1])
    (warning,) = silenced(optimizer.step)
    assert "step()" in str(warning.message)


# ---------------------------------------------------------------------- gradients set to zero


def test_setting_gradients_to_zero_or_to_none_is_the_same(make_model, batches, arm) -> None:
    model, twin = make_model(), make_model()
    optimizer = optimizer_for(model, arm)
    for batch in batches:
        optimizer.zero_grad(set_to_none=False)
        loss_of(model, batch).backward()
        optimizer.step()
    train(twin, optimizer_for(twin, arm), batches)
    assert_same(model, twin)
    assert optimizer.stats().served_share == (arm in LEARNED)


REACHES = {
    "none": lambda model: None,
    "the upper layers": lambda model: model[2:](torch.ones(8, 7)).sum().backward(),
}


@pytest.mark.parametrize("reach", REACHES.values(), ids=REACHES)
@pytest.mark.parametrize("arm", WITH_FACTORS)
def test_a_layer_that_no_data_reached_since_its_gradient_was_zeroed_is_no_miss(make_model, batches, arm, reach) -> None:
    model = make_model()
    optimizer = optimizer_for(model, arm)
    train(model, optimizer, batches[:2])
    optimizer.zero_grad(set_to_none=False)
    reach(model)
    optimizer.step()
