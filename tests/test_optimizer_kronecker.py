"""The nominal term ``kronecker_adam`` in an optimizer: which basis each parameter gets, and what it commutes with."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gmn_optim import GMNOptimizer
from gmn_optim.rule import RuleConfig, UpdateRule
from gmn_optim.rule import matrices as matrices_module
from tests.cases import assert_same, distance, mlp, snapshot, train

FACTORS, GRAM, PLAIN = "Kronecker factors of each data point", "Gram matrices of the gradient", "plain Adam"


def kronecker_adam(model: nn.Module, params: object = None, **options: object) -> GMNOptimizer:
    """Return the nominal term alone as an optimizer."""
    return GMNOptimizer(model, params, weights=None, nominal="kronecker_adam", **options)


def sources(optimizer: GMNOptimizer) -> dict[str, str]:
    """Return the reasons of the summary by parameter."""
    return {row.parameter: row.because for row in optimizer.summary().rows}


def random_batches(count: int, *shape: int) -> list[Tensor]:
    """Return batches in float64."""
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(*shape, generator=generator).double() for _ in range(count)]


def descend(model: nn.Module, optimizer: GMNOptimizer, batches: list[Tensor], loss: Callable) -> list[float]:
    """Train and return the losses."""
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        value = loss(model, batch)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


# ---------------------------------------------------------------------- by itself


def test_by_itself_it_gets_further_than_adam_on_correlated_inputs() -> None:
    torch.manual_seed(0)
    mix, teacher = torch.randn(10, 10) * torch.logspace(0, -2, 10), torch.randn(10, 3)
    model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 3))
    batches = list(torch.randn(150, 64, 10))

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch @ mix) - (batch @ teacher).tanh()).square().mean()

    def last(make: Callable[[nn.Module], torch.optim.Optimizer]) -> float:
        twin = copy.deepcopy(model)
        return sum(descend(twin, make(twin), batches, loss)[-10:])

    lrs = 0.003, 0.01, 0.03
    adam = min(last(lambda m, lr=lr: torch.optim.Adam(m.parameters(), lr)) for lr in lrs)
    assert min(last(lambda m, lr=lr: kronecker_adam(m, lr=lr)) for lr in lrs) < 0.7 * adam


def test_its_lr_is_the_step_size_and_has_a_default_of_its_own(make_model, doubles) -> None:
    model, twin = make_model(torch.float64), make_model(torch.float64)
    train(model, kronecker_adam(model), doubles)
    train(twin, kronecker_adam(twin, lr=0.01), doubles)
    assert_same(model, twin)
    assert kronecker_adam(make_model()).param_groups[0]["lr"] == 0.01


def test_weight_decay_is_decoupled(make_model, doubles) -> None:
    model, twin = make_model(torch.float64), make_model(torch.float64)
    train(model, kronecker_adam(model, lr=0.1, weight_decay=0.5), doubles[:1])
    train(twin, kronecker_adam(twin, lr=0.1), doubles[:1])
    start = make_model(torch.float64)
    wanted = {
        name: value - 0.1 * 0.5 * dict(start.named_parameters())[name].detach()
        for name, value in snapshot(twin).items()
    }
    assert_same(model, wanted, rtol=1e-12, atol=1e-14)


def test_maximize_climbs_where_the_other_descends(make_model, doubles) -> None:
    model, twin = make_model(torch.float64), make_model(torch.float64)
    train(model, kronecker_adam(model, maximize=True), doubles, -1.0)
    train(twin, kronecker_adam(twin), doubles)
    assert_same(model, twin, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------- state


@pytest.mark.parametrize("stop", [3, 9, 10, 15, 20])
def test_a_saved_state_goes_on_bit_by_bit_across_new_bases(make_model, batches, stop) -> None:
    model, batches = make_model(), (batches * 3)[:24]
    whole = kronecker_adam(model)
    file = io.BytesIO()
    for number, batch in enumerate(batches):
        if number == stop:
            torch.save({"model": model.state_dict(), "optimizer": whole.state_dict()}, file)
        train(model, whole, [batch])
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin = make_model()
    twin.load_state_dict(saved["model"])
    resumed = kronecker_adam(twin)
    resumed.load_state_dict(saved["optimizer"])
    train(twin, resumed, batches[stop:])
    assert_same(model, twin)
    assert all(map(torch.equal, *(o.state[m[0].weight].values() for o, m in ((whole, model), (resumed, twin)))))


def test_a_bias_that_is_frozen_midway_lets_its_weight_find_a_new_basis(make_model, batches) -> None:
    model = make_model()
    optimizer = kronecker_adam(model)
    train(model, optimizer, batches[:5])
    model[0].bias.requires_grad_(False)
    optimizer.zero_grad()
    frozen, before = model[0].bias.clone(), snapshot(model)
    train(model, optimizer, batches[5:8])
    state = optimizer.state[model[0].weight]
    assert torch.equal(model[0].bias, frozen) and state["basis_age"] == 3 and state["step"] == 8
    assert state["basis_columns"].shape == (1, 5, 5)
    step = (snapshot(model)["0.weight"] - before["0.weight"]).abs().max()
    assert 0 < step < 3 * 0.05


# ---------------------------------------------------------------------- what it commutes with


def rotation(size: int, seed: int) -> Tensor:
    """Return a random orthogonal matrix."""
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double())[0]


def test_rotations_of_inputs_hidden_neurons_and_outputs_commute_with_training() -> None:
    torch.manual_seed(0)
    turns = [rotation(size, seed) for seed, size in enumerate((5, 6, 4))]
    target = torch.randn(5, 4).double()

    def turned(model: nn.Sequential) -> nn.Sequential:
        other = copy.deepcopy(model)
        with torch.no_grad():
            for layer, ins, outs in zip(other, turns[:-1], turns[1:], strict=True):
                layer.weight.copy_(outs @ layer.weight @ ins.mT)
                layer.bias.copy_(outs @ layer.bias)
        return other

    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4)).double()
    start, twin = copy.deepcopy(model), turned(model)
    batches = random_batches(25, 16, 5)
    descend(model, kronecker_adam(model), batches, lambda m, x: (m(x) - x.sin() @ target).square().mean())
    descend(
        twin,
        kronecker_adam(twin),
        batches,
        lambda m, x: (m(x @ turns[0].mT) - x.sin() @ target @ turns[2].mT).square().mean(),
    )
    assert distance(model, start) > 0.1
    assert_same(twin, turned(model), rtol=1e-6, atol=1e-7)


def test_permuted_data_points_change_nothing(make_model, doubles) -> None:
    model, twin = make_model(torch.float64), make_model(torch.float64)
    train(model, kronecker_adam(model), doubles)
    train(twin, kronecker_adam(twin), [batch.flip(0) for batch in doubles])
    assert_same(model, twin, rtol=1e-8, atol=1e-10)


# ---------------------------------------------------------------------- which basis, and who says so


def test_the_summary_says_what_each_basis_is_made_from() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 3), nn.Bilinear(1, 3, 2)
    )[:4]
    model.register_parameter("extra", nn.Parameter(torch.ones(2, 3)))
    optimizer = kronecker_adam(model)
    found = sources(optimizer)
    assert found["0.weight"] == found["0.bias"] == found["3.weight"] == found["3.bias"] == FACTORS
    assert found["2.weight"] == found["2.bias"] == PLAIN
    assert found["extra"].startswith(GRAM)
    (model(torch.randn(5, 2, 4, 4)).square().mean() + model.extra.square().sum()).backward()
    optimizer.step()
    assert sources(optimizer) == found
    optimizer.close()
    assert sources(optimizer)["3.weight"] == f"{GRAM}: the optimizer is closed"


def test_with_a_learned_term_the_summary_gives_both_reasons() -> None:
    rule = UpdateRule(RuleConfig(nominal="kronecker_adam"))
    assert sources(GMNOptimizer(nn.Linear(3, 2), weights=rule))["weight"] == f"the rule needs no factors; {FACTORS}"


def test_long_sides_and_tables_are_one_sided(monkeypatch) -> None:
    monkeypatch.setattr(matrices_module, "LONGEST_SIDE", 8)
    model = nn.Sequential(nn.Embedding(20, 4), nn.Linear(4, 9), nn.Linear(9, 3), nn.Linear(3, 9), nn.Linear(9, 10))
    found = sources(kronecker_adam(model))
    assert found["0.weight"] == found["1.weight"] == f"{FACTORS}, columns only"
    assert found["2.weight"] == f"{FACTORS}, rows only" and found["4.weight"] == PLAIN


def test_a_bias_in_a_group_with_a_momentum_of_its_own_is_plain_adam(make_model, doubles) -> None:
    model, twin = make_model(torch.float64), make_model(torch.float64)
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    optimizer = kronecker_adam(model, [{"params": weights}, {"params": biases, "momentum": 0.9}])
    assert {row.because for row in optimizer.summary().rows if row.parameter.endswith("bias")} == {PLAIN}
    train(model, optimizer, doubles[:1])
    train(twin, torch.optim.Adam(twin.parameters(), 0.01), doubles[:1])
    assert_same(
        model[0], {"weight": snapshot(model[0])["weight"], "bias": snapshot(twin[0])["bias"]}, rtol=1e-9, atol=0
    )


def test_grouped_convolutions_and_transposed_ones_train() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.Tanh(), nn.ConvTranspose2d(4, 2, 2, groups=2), nn.Tanh()
    ).double()
    optimizer = kronecker_adam(model)
    batches = [torch.randn(6, 2, 5, 5).double()] * 40
    losses = descend(model, optimizer, batches, lambda m, x: (m(x)[..., :5, :5] - 0.3 * x).square().mean())
    assert losses[-1] < 0.7 * losses[0]
    assert optimizer.state[model[0].weight]["basis_columns"].shape == (2, 10, 10)
    assert optimizer.state[model[2].weight]["basis_rows"].shape == (2, 4, 4)
    assert sources(optimizer)["2.weight"] == FACTORS and sources(optimizer)["2.bias"] == PLAIN


def test_second_derivatives_fall_back_to_the_gradients_gram_matrices() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    optimizer = kronecker_adam(model)

    def residual(model: nn.Module, points: Tensor) -> Tensor:
        points = points.requires_grad_()
        (slope,) = torch.autograd.grad(model(points).sum(), points, create_graph=True)
        return (slope - points.cos()).square().mean() + model(torch.zeros(1, 1).double()).square().sum()

    losses = descend(model, optimizer, random_batches(150, 32, 1), residual)
    assert sum(losses[-10:]) < 0.1 * sum(losses[:10])
    assert sources(optimizer)["2.weight"].startswith(GRAM)


def test_a_penalty_every_other_step_keeps_one_basis(make_model, doubles) -> None:
    model = make_model(torch.float64)
    optimizer = kronecker_adam(model)
    for number, batch in enumerate(doubles):
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        if number % 2:
            gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
            loss = loss + sum(each.square().sum() for each in gradients)
        loss.backward()
        optimizer.step()
    assert optimizer.state[model[0].weight]["basis_age"] == len(doubles)


def test_functional_use_trains_without_warnings() -> None:
    model = mlp()
    optimizer, weight = kronecker_adam(model), model[0].weight
    before = weight.detach().clone()
    nn.functional.linear(torch.randn(8, 5), weight).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, weight) and sources(optimizer)["0.weight"].startswith(GRAM)


def test_layers_that_take_turns_are_all_followed() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])
    optimizer = GMNOptimizer(model, weights=None, nominal="kronecker_schedule_free")
    seen: list[list[Tensor]] = [[], []]
    for step in range(80):
        layer = model[step % 2]
        optimizer.zero_grad()
        layer(torch.randn(6, 4)).square().sum().backward()
        optimizer.step()
        seen[step % 2].append(optimizer.state[layer.weight]["basis_row_preconditioner"].clone())
    for own in seen:
        assert not torch.equal(own[14], own[19]) and not torch.equal(own[29], own[34])


def test_a_layer_that_joins_between_two_looks_takes_a_step_at_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).requires_grad_(True)
    optimizer = GMNOptimizer(model, weights=None, nominal="kronecker_schedule_free")
    for step in range(1, 13):
        model[0].requires_grad_(step == 12)
        before = model[0].weight.detach().clone()
        optimizer.zero_grad()
        model(torch.randn(6, 4)).square().sum().backward()
        optimizer.step()
    assert (model[0].weight - before).abs().max() > 1e-4
