"""The body in the eigenbasis in an optimizer: rotations of hidden spaces, its guard, and the rows it does not see."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from gmn_optim import GMNOptimizer, GradientCapture, stepping
from gmn_optim.errors import InvalidArgumentError
from gmn_optim.rule import RuleConfig, UpdateRule
from gmn_optim.rule.coordinates import TurnedRows
from tests.cases import (
    IN_EIGENBASIS,
    assert_same,
    distance,
    loss_of,
    make_rule,
    mlp,
    optimizer_for,
    snapshot,
    train,
    without_learned_term,
)


class Radial(nn.Module):
    """Scales the whole hidden layer by a function of its length: rotations pass through."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x tanh(|x|) / |x|``."""
        length = x.norm(dim=-1, keepdim=True)
        return x * length.tanh() / length


def rotated(model: nn.Sequential) -> nn.Sequential:
    """Return a copy with its hidden space rotated; it computes the same."""
    other = copy.deepcopy(model)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(9)).double())[0]
    with torch.no_grad():
        other[0].weight.copy_(turn @ model[0].weight)
        other[0].bias.copy_(turn @ model[0].bias)
        other[-1].weight.copy_(model[-1].weight @ turn.mT)
    return other


@pytest.mark.parametrize("hidden", [nn.Identity, Radial])
@pytest.mark.parametrize("arm", IN_EIGENBASIS)
def test_rotations_of_the_hidden_space_commute_with_training(arm: str, hidden: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), hidden(), nn.Linear(6, 7)).double()
    start, twin = copy.deepcopy(model), rotated(model)
    batches = [torch.randn(40, 8).double() * torch.linspace(0.5, 2.0, 8).double() for _ in range(15)]
    for each in (model, twin):
        train(each, optimizer_for(each, arm), batches)
    assert distance(model, start) > 0.01
    assert_same(twin, rotated(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e6])
@pytest.mark.parametrize("arm", ["eigenbasis", "eigenbasis+gmn"])
def test_a_bad_learned_step_gives_way_to_the_nominal_one_and_is_counted(make_model, doubles, arm, bad) -> None:
    model, twin, rule = make_model(torch.float64), make_model(torch.float64), make_rule(arm)
    plain = make_rule(arm)
    for parameter in plain.body.output.parameters():
        parameter.zero_()
    rule.body.output.weight.zero_()
    rule.body.output.bias.copy_(torch.tensor([0.0, bad]))
    optimizer = GMNOptimizer(model, weights=rule)
    train(model, optimizer, doubles[:2])
    train(twin, GMNOptimizer(twin, weights=plain), doubles[:2])
    assert_same(model, twin)
    reports = optimizer.stats().parameters
    assert {name: report.guarded for name, report in reports.items()} == dict.fromkeys(reports, 2)


@pytest.mark.parametrize("arm", IN_EIGENBASIS)
def test_odd_batches_and_precisions_leave_finite_parameters(arm: str) -> None:
    for dtype, batch in ((torch.bfloat16, torch.randn(8, 5)), (torch.float32, torch.zeros(8, 5)),
                         (torch.float32, torch.randn(1, 5))):  # fmt: skip
        model = mlp().to(dtype)
        before = snapshot(model)
        train(model, optimizer_for(model, arm), [batch.to(dtype)] * 5)
        assert all(p.isfinite().all() for p in model.parameters()) and distance(model, before) > 0


@pytest.mark.parametrize("config", [{"nominal": "adam"}, {"nominal": "kronecker_schedule_free", "gated": True}])
def test_a_body_without_bases_or_with_a_gate_is_refused(config: dict) -> None:
    with pytest.raises(InvalidArgumentError, match="body = 'eigenbasis' must be another with this nominal term"):
        RuleConfig(body="eigenbasis", **config)


def noise(capture: GradientCapture, squares: bool) -> Tensor:
    """Return the noise that the captured rows show."""
    activations, backprops = capture.gradients(for_squares=squares)[""]
    return TurnedRows(activations.movedim(1, 0), backprops.movedim(1, 0)).noise()


def test_a_budget_of_rows_leaves_the_noise_about_as_it_is_on_average() -> None:
    torch.manual_seed(0)
    layer, found, wanted = nn.Linear(3, 2).double(), [], []
    whole, thin = GradientCapture(layer), GradientCapture(layer, rows=10)
    for _ in range(400):
        layer.zero_grad()
        loss_of(layer, torch.randn(40, 3).double()).backward()
        found.append(noise(thin, True))
        wanted.append(noise(whole, True))
        assert torch.equal(noise(whole, True), noise(whole, False))
        torch.testing.assert_close(noise(thin, False), 4.0 * noise(thin, True))
        whole.clear(), thin.clear()
    torch.testing.assert_close(
        torch.stack(found).mean(0), torch.stack(wanted).mean(0), rtol=0.2, atol=0
    )  # ranks are no draw


@pytest.mark.parametrize("arm", IN_EIGENBASIS)
def test_a_budget_that_is_large_enough_changes_nothing(make_model, doubles, arm) -> None:
    model, twin = make_model(torch.float64), make_model(torch.float64)
    train(model, optimizer_for(model, arm, rows=8), doubles)
    train(twin, optimizer_for(twin, arm, rows=None), doubles)
    assert_same(model, twin)


def rule_with(**changes: float) -> UpdateRule:
    """Return a rule with random meta-parameters and some of its configuration changed."""
    rule = make_rule("eigenbasis")
    other = UpdateRule(replace(rule.config, **changes)).double().requires_grad_(False)
    other.load_state_dict(rule.state_dict())
    return other


def test_a_share_of_nothing_is_the_nominal_term_and_a_half_is_neither(make_model, doubles) -> None:
    models = {}
    for name, rule in {
        "none": rule_with(share=0.0),
        "half": rule_with(share=0.5),
        "all": rule_with(),
        "nominal": without_learned_term(rule_with()),
    }.items():
        models[name] = make_model(torch.float64)
        train(models[name], GMNOptimizer(models[name], weights=rule), doubles[:3])
    assert_same(models["none"], models["nominal"])
    assert distance(models["half"], models["nominal"]) > 1e-6 and distance(models["half"], models["all"]) > 1e-6


@pytest.mark.parametrize(("factor", "is_served"), [(0.1, False), (1.0, True), (0.0, True)])
def test_a_model_with_a_matrix_that_is_too_small_gets_the_nominal_term_and_is_counted(
    make_model, doubles, factor: float, is_served: bool
) -> None:
    model = make_model(torch.float64)
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        last.weight.mul_(factor)  # one of zeros is no small one, it starts there on purpose
    twin = copy.deepcopy(model)
    optimizer = GMNOptimizer(model, weights=rule_with(least_size=0.25))
    train(model, optimizer, doubles[:3])
    train(twin, GMNOptimizer(twin, weights=without_learned_term(rule_with())), doubles[:3])
    assert (distance(model, snapshot(twin)) > 1e-6) == is_served
    assert (optimizer.stats().guarded == 0) == is_served


@pytest.mark.parametrize("changes", [{"share": -1.0}, {"least_size": -0.1}])
def test_shares_and_sizes_below_zero_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(changes))):
        rule_with(**changes)


def test_the_rest_of_a_rule_has_neither() -> None:
    with pytest.raises(InvalidArgumentError, match="share = 0.5 must be 1 unless the body is in the eigenbasis"):
        RuleConfig(share=0.5)


@pytest.mark.parametrize(
    ("arm", "steps"), [("eigenbasis", [*range(1, 11), 13, 16, 20]), ("eigenbasis+gmn", [*range(1, 22)])]
)
def test_hooks_keep_nothing_at_steps_that_read_no_factors(make_model, doubles, arm: str, steps: list[int]) -> None:
    model, read = make_model(torch.float64), []
    optimizer = optimizer_for(model, arm)
    for step in range(1, 22):
        optimizer.zero_grad()
        loss_of(model, doubles[0]).backward()
        read += [step] if optimizer.memory_usage().factors else []
        optimizer.step()
    assert read == steps
    assert optimizer.stats().served_share > 0


def test_an_optimizer_that_goes_on_from_a_saved_state_reads_the_same_steps(make_model, doubles) -> None:
    batches = [doubles[number % len(doubles)] for number in range(24)]
    model, twin = make_model(torch.float64), make_model(torch.float64)
    train(model, optimizer_for(model, "eigenbasis"), batches)
    first = optimizer_for(twin, "eigenbasis")
    train(twin, first, batches[:13])
    second = optimizer_for(twin, "eigenbasis")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    first.close()
    train(twin, second, batches[13:])
    assert_same(model, twin)


def test_steps_between_two_looks_are_measured_once_somebody_asked() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    inputs, optimizer, moves = torch.randn(8, 5), GMNOptimizer(model), []
    for number in range(1, 18):
        before = model.weight.detach().clone()
        optimizer.zero_grad()
        (model(inputs) - inputs[:, :3]).square().mean().backward()
        optimizer.step()
        moves.append((model.weight.detach() - before).square().mean().sqrt().item())
        if number > 11:  # looks are at 10, 13 and 16
            newest = optimizer.stats().parameters["weight"].update_rms
            assert newest == pytest.approx(moves[9] if number == 12 else moves[-1], rel=1e-3)
    assert len(set(moves)) == len(moves)


def train_small(optimizer: GMNOptimizer, model: nn.Module, steps: int) -> None:
    """Take some steps on one batch."""
    inputs = torch.linspace(-1, 1, 40).view(8, 5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


def test_the_first_step_of_a_loaded_or_partly_frozen_model_is_measured() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = GMNOptimizer(model)
    train_small(optimizer, model, 57)
    again = GMNOptimizer(model)
    again.load_state_dict(optimizer.state_dict())
    train_small(again, model, 1)
    assert set(again.stats().parameters) == {name for name, _ in model.named_parameters()}
    model[0].requires_grad_(False)
    train_small(optimizer, model, 1)
    assert set(optimizer.stats().parameters) == {"2.weight", "2.bias"}


def test_what_a_failed_first_step_found_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    torch.manual_seed(0)
    model = nn.Linear(5, 4)
    twin, first = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    optimizer = GMNOptimizer(model)
    with torch.no_grad():
        model.weight *= 0.1
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stepping, "_apply_updates", fail)
        train_small(optimizer, model, 1)
    model.load_state_dict(first)
    train_small(optimizer, model, 3)
    train_small(GMNOptimizer(twin), twin, 3)
    assert torch.equal(model.weight, twin.weight)


def test_a_state_with_other_bases_keeps_the_size_of_the_weights_at_first() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 4)
    optimizer = GMNOptimizer(model)
    train_small(optimizer, model, 12)
    saved = optimizer.state_dict()
    size = saved["state"][0]["basis_size"].clone()
    saved["state"][0]["basis_columns"] = torch.zeros(1, 6, 3)
    again = GMNOptimizer(model)
    again.load_state_dict(saved)
    with torch.no_grad():
        model.weight *= 3
    train_small(again, model, 2)
    entries = again.state_dict()["state"][0]
    assert torch.equal(entries["basis_size"], size) and entries["basis_age"] == 2
