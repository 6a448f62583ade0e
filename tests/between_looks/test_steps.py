"""Steps between two looks at the factors are the rule's own, whatever is trained and however."""

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from gmn_optim import GMNOptimizer, stepping
from gmn_optim.between_looks import StepsBetweenLooks
from gmn_optim.rule import RuleConfig, UpdateRule
from gmn_optim.rule.look_schedule import FIRST_LOOKS
from gmn_optim.weights import load_weights
from tests import models
from tests.cases import (
    MODELS,
    WARNING_MODELS,
    ModelCase,
    assert_equal_states,
    assert_same,
    loss_of,
    make_case,
    saved_and_loaded,
    train,
)

STEPS = 34
BETWEEN = sum(age not in FIRST_LOOKS for age in range(1, STEPS + 1))
CASES = {**MODELS, **WARNING_MODELS}
NOISE = "attention.k.bias", "token", "positions"
"""The gradient of the first is rounding error. The bases of the others, which no factors explain, lack rank at first:
rounding errors turn them."""

Make = Callable[[nn.Module], GMNOptimizer]


class Counter:
    """Lets steps between two looks be taken, or leaves them to the rule, and counts those taken."""

    def __init__(self) -> None:
        self.taken, self.off, self._take = 0, False, stepping._take_between_looks

    def __call__(self, *args: object) -> bool:
        """Return whether the step was taken."""
        taken = not self.off and self._take(*args)
        self.taken += taken
        return taken


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    """Count the steps that are taken between two looks."""
    counter = Counter()
    monkeypatch.setattr(stepping, "_take_between_looks", counter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers without factors
        yield counter


def both(counter: Counter, case: ModelCase, make: Make, change: Callable[[int, Tensor], Tensor] | None = None) -> None:
    """Require that training with and without them ends the same, all that is remembered included."""
    ends = []
    for counter.off in (False, True):
        model, batches = make_case(case, STEPS)
        model, optimizer = model.double(), make(model)
        for number, batch in enumerate(_doubles(batches)):
            torch.manual_seed(number)  # of dropout
            train(model, optimizer, [batch if change is None else change(number, batch)])
        ends.append((model, optimizer))
    (model, optimizer), (twin, other) = ends
    rounding = 1e-6 if case is MODELS["vision model"] else 1e-9
    for name, parameter in model.named_parameters():
        if not name.endswith(NOISE):
            others = twin.get_parameter(name)
            torch.testing.assert_close(parameter, others, rtol=1e3 * rounding, atol=rounding)
            mine, theirs = (_in_any_basis(own.state[each]) for own, each in ((optimizer, parameter), (other, others)))
            torch.testing.assert_close(mine, theirs, rtol=1e4 * rounding, atol=10 * rounding)
    assert _counts(optimizer) == _counts(other)


def _in_any_basis(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries that do not hang on the order and the signs of eigenvectors, which rounding may decide."""
    return {key: value for key, value in state.items() if key not in ("basis_rows", "basis_columns", "nominal_1")}


def _doubles(batches: list[Tensor]) -> list[Tensor]:
    """Return batches in float64, if they are numbers of that kind."""
    return [batch.double() if batch.is_floating_point() else batch for batch in batches]


def _counts(optimizer: GMNOptimizer) -> tuple[int, int, int]:
    """Return the steps, guarded and skipped ones, that an optimizer counted."""
    report = optimizer.stats()
    return report.steps, report.guarded, report.skipped


def with_config(**changes: object) -> UpdateRule:
    """Return the default rule with another configuration."""
    rule = copy.deepcopy(load_weights("default").rule)
    for name, value in changes.items():
        object.__setattr__(rule.config, name, value)
    return rule


@pytest.mark.parametrize("largest", [0.0, 0.5])
def test_elements_are_bounded_as_by_the_rule(counter: Counter, largest: float) -> None:
    rule = load_weights("default").rule
    bounded = UpdateRule(replace(rule.config, largest_element=largest)).requires_grad_(False)
    bounded.load_state_dict(rule.state_dict())
    both(counter, MODELS["relu"], lambda model: GMNOptimizer(model, weights=bounded))
    assert counter.taken == BETWEEN


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("weights", ["default", None])
def test_steps_are_the_rules(counter: Counter, case: ModelCase, weights: str | None) -> None:
    term = {} if weights else {"nominal": "kronecker_schedule_free"}
    both(counter, case, lambda model: GMNOptimizer(model, weights=weights, **term))
    assert counter.taken == (0 if case is MODELS["loose"] else BETWEEN)  # where a weight lies across memory


def groups(model: nn.Module, **options: object) -> GMNOptimizer:
    """Return an optimizer with two groups, of which the second has options of its own."""
    parameters = [*model.parameters()]
    return GMNOptimizer(model, [{"params": parameters[:3]}, {"params": parameters[3:], **options}])


OPTIONS: dict[str, Make] = {
    "lr": lambda model: groups(model, lr=0.3),
    "weight decay": lambda model: groups(model, weight_decay=0.1),
    "maximize": lambda model: groups(model, lr=0.1, maximize=True),
    "momentum of all": lambda model: GMNOptimizer(model, momentum=0.5),
    "zero lr": lambda model: groups(model, lr=0.0),
    "guarded": lambda model: GMNOptimizer(model, weights=with_config(guard=0.004)),
    "weights too small": lambda model: GMNOptimizer(model, weights=with_config(least_size=5.0)),
    "no annealing": lambda model: GMNOptimizer(model, weights=with_config(annealing=0.0)),
    "no concentration": lambda model: GMNOptimizer(model, weights=with_config(concentration=0.0)),
    "neither": lambda model: GMNOptimizer(model, weights=with_config(annealing=0.0, concentration=0.0, epochs=0.0)),
    "no epochs": lambda model: GMNOptimizer(model, weights=with_config(epochs=0.0)),
    "epochs alone": lambda model: GMNOptimizer(model, weights=with_config(annealing=0.0, epochs=0.5)),
    "half of the pace": lambda model: GMNOptimizer(model, weights=with_config(share=0.5)),
}


@pytest.mark.parametrize("make", OPTIONS.values(), ids=OPTIONS)
def test_options_have_their_effect(counter: Counter, make: Make) -> None:
    both(counter, MODELS["layer norm"], make)
    assert counter.taken == BETWEEN


def test_the_guard_counts(counter: Counter) -> None:
    model, batches = make_case(MODELS["relu"], STEPS)
    optimizer = GMNOptimizer(model, weights=with_config(guard=0.004))
    train(model, optimizer, batches)
    assert counter.taken == BETWEEN
    assert optimizer.stats().guarded > BETWEEN


def test_small_weights_by_design(counter: Counter) -> None:
    def siren() -> nn.Module:
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3))
        with torch.no_grad():
            model[2].weight *= 0.1
            model[4].weight *= 0.1
        return model

    both(counter, ModelCase(siren, MODELS["relu"].inputs, ()), GMNOptimizer)
    assert counter.taken == BETWEEN


def test_a_closed_optimizer(counter: Counter) -> None:
    def closed(model: nn.Module) -> GMNOptimizer:
        optimizer = GMNOptimizer(model)
        optimizer.close()
        return optimizer

    both(counter, MODELS["relu"], closed)
    assert counter.taken == BETWEEN


def test_steps_that_outgrow_the_look_are_bounded(counter: Counter) -> None:
    both(counter, MODELS["relu"], GMNOptimizer, lambda number, batch: batch * (30.0 if number == 32 else 1.0))
    assert counter.taken == BETWEEN


@pytest.mark.parametrize("scale", [0.0, 1e-25, 1e35], ids=["zero", "vanishing", "overflowing"])
def test_extraordinary_inputs_are_left_to_the_rule_or_agree_with_it(counter: Counter, scale: float) -> None:
    both(counter, MODELS["relu"], GMNOptimizer, lambda number, batch: batch * (scale if number > 25 else 1.0))


@pytest.mark.parametrize("scale", [1e-30, 1e-19], ids=["length underflows", "square underflows"])
def test_gradients_whose_lengths_underflow_agree_with_the_rule(counter: Counter, scale: float) -> None:
    found = []
    for counter.off in (False, True):
        model, batches = make_case(MODELS["relu"], STEPS)
        optimizer = GMNOptimizer(model)
        train(model, optimizer, batches[:31])
        train(model, optimizer, batches[31:32], scale)
        found.append([optimizer.state[model[place].weight]["basis_memory"] for place in (0, 2, 4)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
        assert mine[1].abs() < 1.5


def test_a_parameter_that_takes_no_part(counter: Counter) -> None:
    def with_pauses(model: nn.Module) -> GMNOptimizer:
        numbers = iter(range(STEPS))

        def pause(*_: object) -> None:
            model[2].weight.requires_grad_(next(numbers) % 8 != 5)

        model.register_forward_pre_hook(pause)
        return GMNOptimizer(model)

    both(counter, MODELS["relu"], with_pauses)
    assert counter.taken > 0


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (lambda model: GMNOptimizer(model, lr=torch.tensor(1.0)), torch.float32),
        (GMNOptimizer, torch.bfloat16),
        (lambda model: groups(model, momentum=0.5), torch.float32),
        (lambda model: GMNOptimizer(model, weights=None, nominal="kronecker_adam"), torch.float32),
        (lambda model: GMNOptimizer(model, weights=None, nominal="adam", lr=1e-3), torch.float32),
    ],
    ids=["tensor lr", "bfloat16", "two clocks", "kronecker_adam", "adam"],
)
def test_what_is_left_to_the_rule(counter: Counter, make: Make, dtype: torch.dtype) -> None:
    model, batches = make_case(MODELS["relu"], STEPS)
    train(model.to(dtype), make(model), [batch.to(dtype) for batch in batches])
    assert counter.taken == 0


def test_weights_that_lie_in_memory_like_images_are_left_to_the_rule(counter: Counter) -> None:
    model = models.ResNet().to(memory_format=torch.channels_last)
    train(model, GMNOptimizer(model), [torch.randn(6, 2, 6, 6) for _ in range(STEPS)])
    assert counter.taken == 0


def test_a_rule_with_a_schedule_is_left_to_itself() -> None:
    rule = UpdateRule(RuleConfig(nominal="kronecker_schedule_free", body=None, scheduled=True))
    model = nn.Linear(2, 1)
    optimizer = GMNOptimizer(model, weights=rule)
    train(model, optimizer, [torch.ones(3, 2)])
    plan = optimizer._stepper._plan
    assert plan.between_looks is None
    assert not StepsBetweenLooks.serves(rule, plan.layout, plan.state)


# ---------------------------------------------------------------------- what does not change a training


def test_to_look_at_statistics_changes_nothing() -> None:
    (model, batches), (twin, _) = (make_case(MODELS["layer norm"], STEPS) for _ in range(2))
    optimizer, other = GMNOptimizer(model), GMNOptimizer(twin)
    for batch in batches:
        train(model, optimizer, [batch])
        optimizer.stats()
    train(twin, other, batches)
    assert_same(model, twin)


@pytest.mark.parametrize("case", [MODELS["layer norm"], MODELS["inputs first"], MODELS["language model"]])
def test_statistics_between_looks_are_of_the_step_taken(case: ModelCase) -> None:
    model, batches = make_case(case, 33)
    model, optimizer = model.double(), GMNOptimizer(model)
    batches = _doubles(batches)
    train(model, optimizer, batches[:31])
    optimizer.stats()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, optimizer, batches[31:32])
    for name, report in optimizer.stats().parameters.items():
        parameter = dict(model.named_parameters())[name]
        step, gradient = before[name] - parameter.detach(), parameter.grad
        assert report.update_rms == pytest.approx(step.square().mean().sqrt().item(), rel=1e-6, abs=1e-14)
        cosine = (step * gradient).sum() / (step.norm() * gradient.norm()).clamp_min(1e-300)
        if step.norm() * gradient.norm() > 1e-25:  # else rounding errors
            assert report.cosine == pytest.approx(cosine.item(), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("split", [12, 31, 33])
def test_a_training_goes_on_bit_by_bit_from_a_saved_state(split: int) -> None:
    model, batches = make_case(MODELS["layer norm"], STEPS + 10)
    optimizer = GMNOptimizer(model)
    train(model, optimizer, batches[:split])
    twin = copy.deepcopy(model)
    other = GMNOptimizer(twin)
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    for each, own in ((model, optimizer), (twin, other)):
        train(each, own, batches[split:])
    assert_same(model, twin)
    assert_equal_states(optimizer.state_dict(), other.state_dict())


@pytest.mark.parametrize(
    ("group", "option", "value"),
    [
        (0, "lr", None),
        (1, "lr", None),
        (0, "lr", 1e45),
        (0, "weight_decay", "a"),
        (1, "weight_decay", "a"),
        (0, "momentum", "b"),
    ],
)
def test_a_step_that_fails_changes_nothing(group: int, option: str, value: object) -> None:
    model, batches = make_case(MODELS["layer norm"], STEPS)
    optimizer = GMNOptimizer(model, weights=with_config(guard=0.004)) if option == "momentum" else groups(model, lr=0.9)
    train(model, optimizer, batches[:31])
    loss_of(model, batches[31]).backward()
    right, before, state = optimizer.param_groups[group][option], copy.deepcopy(model), copy.deepcopy(optimizer.state)
    optimizer.param_groups[group][option] = value
    with pytest.raises((TypeError, RuntimeError, ValueError)):
        optimizer.step()
    optimizer.param_groups[group][option] = right
    assert_same(model, before)
    for mine, theirs in zip(optimizer.state.values(), state.values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
