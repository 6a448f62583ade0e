"""What a step is: alone the nominal term equals torch, the whole equals meta-training, scale is immaterial."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from gmn_optim import GMNOptimizer
from gmn_optim.metatrain.unroll import Unroll, UnrollState
from gmn_optim.rule import UpdateRule
from gmn_optim.tasks.base import AbstractTask, Batch, Parameters
from tests.cases import (
    ARMS,
    IN_EIGENBASIS,
    LEARNED,
    SOME,
    WITH_FACTORS,
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
from tests.tables import ELEMENTWISE_TERMS, NOMINAL_TERMS

EXACT = {"rtol": 1e-12, "atol": 1e-14}
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm not in IN_EIGENBASIS])
@pytest.mark.parametrize("nominal", ELEMENTWISE_TERMS)
def test_an_untrained_rule_equals_torch_step_by_step(make_model, doubles, nominal, arm) -> None:
    model, twin = make_model(torch.float64), make_model(torch.float64)
    ours = GMNOptimizer(model, weights=UpdateRule(replace(ARMS[arm], nominal=nominal, alpha=0.2)), lr=0.7)
    theirs = NOMINAL_TERMS[nominal](twin.parameters(), 0.7 * 0.2)
    for batch in doubles:
        train(model, ours, [batch])
        train(twin, theirs, [batch])
        assert_same(model, twin, **EXACT)


@pytest.mark.parametrize("arm", SOME)
def test_with_weight_decay_an_untrained_rule_on_adam_equals_adamw(make_model, doubles, arm) -> None:
    model, twin = make_model(torch.float64), make_model(torch.float64)
    rule = UpdateRule(replace(ARMS[arm], nominal="adam", alpha=0.2))
    train(model, GMNOptimizer(model, weights=rule, lr=0.7, weight_decay=0.03), doubles)
    train(twin, torch.optim.AdamW(twin.parameters(), lr=0.7 * 0.2, weight_decay=0.03), doubles)
    assert_same(model, twin, **EXACT)


@pytest.mark.parametrize("nominal", ELEMENTWISE_TERMS)
def test_without_weights_lr_is_the_ordinary_one(make_model, doubles, nominal) -> None:
    model, twin = make_model(torch.float64), make_model(torch.float64)
    train(model, GMNOptimizer(model, weights=None, nominal=nominal, lr=0.02), doubles)
    train(twin, NOMINAL_TERMS[nominal](twin.parameters(), 0.02), doubles)
    assert_same(model, twin, **EXACT)


@pytest.mark.parametrize("arm", LEARNED)
def test_a_random_rule_moves_parameters_elsewhere_than_its_nominal_term(make_model, batches, arm) -> None:
    model, twin = make_model(), make_model()
    rule = make_rule(arm)
    optimizer = GMNOptimizer(model, weights=rule)
    train(model, optimizer, batches)
    train(twin, GMNOptimizer(twin, weights=without_learned_term(rule)), batches)
    assert distance(model, twin) > 1e-3
    assert optimizer.stats().guarded == 0 and optimizer.stats().served_share == 1.0


@pytest.mark.parametrize("arm", WITH_FACTORS)
def test_the_factors_matter_to_the_step(make_model, batches, arm) -> None:
    model, twin = make_model(), make_model()
    rule, deaf = make_rule(arm), make_rule(arm)
    heard = [deaf.body.from_inputs, deaf.body.from_outputs] if arm in IN_EIGENBASIS else [deaf.gradmetanet.product]
    for parameter in nn.ModuleList(heard).parameters():
        parameter.zero_()
    train(model, GMNOptimizer(model, weights=rule), batches)
    train(twin, GMNOptimizer(twin, weights=deaf), batches)
    assert distance(model, twin) > 1e-4


def test_every_arm_descends(make_model, batches, arm) -> None:
    model = make_model()
    before = loss_of(model, batches[0]).item()
    assert train(model, optimizer_for(model, arm), batches[:1] * 100) < 0.8 * before


class TinyTask(AbstractTask):
    """Regression with a small network in float64."""

    horizon, loss_limit = 10, 1e6

    def __init__(self) -> None:
        self.module = mlp().double()

    def init_parameters(self, generator: torch.Generator) -> Parameters:
        """Return normal parameters."""
        draw = {name: torch.randn(p.shape, generator=generator) for name, p in self.module.named_parameters()}
        return {name: 0.4 * value.double() for name, value in draw.items()}

    def sample_batch(self, generator: torch.Generator, shape: tuple[int, ...] = ()) -> Batch:
        """Return inputs (*shape, 8, 5)."""
        return (torch.randn(*shape, 8, 5, generator=generator).double(),)

    def loss(self, parameters: Parameters, batch: Batch) -> Tensor:
        """Return the loss ()."""
        outputs = torch.func.functional_call(self.module, parameters, batch)
        return (outputs - torch.linspace(-1.0, 1.0, 3, dtype=torch.float64)).square().mean()


def test_a_step_equals_one_inner_step_of_meta_training(arm, rule) -> None:
    torch.manual_seed(0)
    task, generator = TinyTask(), torch.Generator().manual_seed(2)
    unroll = Unroll(task, rule.double())
    state = unroll.start(generator, 1)
    model = copy.deepcopy(task.module)
    model.load_state_dict(unroll.unflatten(tuple(flat[0] for flat in state.parameters)))
    optimizer = GMNOptimizer(model, weights=rule)
    for _ in range(5):
        batches = unroll.batches(generator, 1, 1)
        state, losses = unroll.run(unroll.meta_parameters(), state, batches)
        loss = train(model, optimizer, [batches[0][0, 0]])
        assert losses.item() == pytest.approx(loss, rel=1e-9)
        assert_same(model, dict(_of_first(unroll, state)), **CLOSE)


def _of_first(unroll: Unroll, state: UnrollState) -> Parameters:
    """Return the parameters of the first unroll by name."""
    return unroll.unflatten(tuple(flat[0] for flat in state.parameters))


@pytest.mark.parametrize("scale", [1e3, 1e-3])
@pytest.mark.parametrize("arm", [arm for arm in ARMS if ARMS[arm].nominal == "adam"])
def test_with_adam_the_scale_of_the_loss_is_immaterial(make_model, doubles, arm, scale) -> None:
    model, twin = make_model(torch.float64), make_model(torch.float64)
    rule = make_rule(arm)
    rule.nominal.epsilon.raw.fill_(-2.0)
    train(model, GMNOptimizer(model, weights=rule), doubles)
    train(twin, GMNOptimizer(twin, weights=rule), doubles, scale)
    assert_same(model, twin, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("scale", [1e3, 1e-3])
@pytest.mark.parametrize("arm", ["momentum+ds", "slots"])
def test_the_scale_of_the_loss_does_not_change_the_learned_direction(make_model, doubles, arm, scale) -> None:
    rule = make_rule(arm)

    def learned_part(scale: float) -> dict[str, Tensor]:
        stepped = []
        for each in (rule, without_learned_term(rule)):
            model = make_model(torch.float64)
            train(model, GMNOptimizer(model, weights=each), doubles[:1], scale)
            stepped.append(snapshot(model))
        return {name: stepped[0][name] - stepped[1][name] for name in stepped[0]}

    wanted = learned_part(1.0)
    assert all(value.abs().max() > 1e-5 for value in wanted.values())
    torch.testing.assert_close(learned_part(scale), wanted, rtol=1e-6, atol=1e-10)


def test_accumulated_gradients_equal_the_large_batch(make_model, doubles, arm) -> None:
    model, twin = make_model(torch.float64), make_model(torch.float64)
    whole, parts = optimizer_for(model, arm), optimizer_for(twin, arm)
    for batch in doubles[:5]:
        train(model, whole, [batch])
        parts.zero_grad()
        for micro in batch.split(2):
            (loss_of(twin, micro) / 4).backward()
        parts.step()
    assert_same(twin, model, **CLOSE)


def test_clipped_gradients_equal_a_loss_of_that_scale(make_model, doubles, arm) -> None:
    model, twin = make_model(torch.float64), make_model(torch.float64)
    clipped, scaled = optimizer_for(model, arm), optimizer_for(twin, arm)
    for batch in doubles[:5]:
        clipped.zero_grad()
        loss_of(model, batch).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        clipped.step()
        train(twin, scaled, [batch], 0.01 / (norm.item() + 1e-6))
    assert_same(model, twin, rtol=1e-8, atol=1e-10)


def test_a_grad_scaler_changes_nothing(make_model, doubles, arm) -> None:
    model, twin = make_model(torch.float64), make_model(torch.float64)
    optimizer, scaler = optimizer_for(model, arm), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for batch in doubles[:5]:
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batch)).backward()
        scaler.step(optimizer)
        scaler.update()
    train(twin, optimizer_for(twin, arm), doubles[:5])
    assert_same(model, twin, **CLOSE)


RESETS = {
    "optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer to zero": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model": lambda model, optimizer: model.zero_grad(),
    "model to zero": lambda model, optimizer: model.zero_grad(set_to_none=False),
}


@pytest.mark.parametrize("reset", RESETS.values(), ids=RESETS)
@pytest.mark.parametrize("arm", SOME)
def test_a_step_skipped_by_a_grad_scaler_leaves_no_factors(make_model, doubles, arm, reset) -> None:
    model, twin = make_model(torch.float64), make_model(torch.float64)
    optimizer, scaler = optimizer_for(model, arm), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number, batch in enumerate(doubles[:6]):
        before = snapshot(model)
        reset(model, optimizer)
        scaler.scale(loss_of(model, batch) * (float("inf") if number == 2 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert (distance(model, before) == 0) == (number == 2)
    train(twin, optimizer_for(twin, arm), doubles[:2] + doubles[3:6])
    assert_same(model, twin, **CLOSE)


@pytest.mark.parametrize("reset", RESETS.values(), ids=RESETS)
@pytest.mark.parametrize("arm", SOME)
def test_gradients_that_were_reset_leave_no_factors(make_model, doubles, arm, reset) -> None:
    model, twin = make_model(torch.float64), make_model(torch.float64)
    optimizer = optimizer_for(model, arm)
    for batch, other in zip(doubles[:4], doubles[4:8], strict=True):
        reset(model, optimizer)
        (3.0 * loss_of(model, other)).backward()
        reset(model, optimizer)
        loss_of(model, batch).backward()
        optimizer.step()
    train(twin, optimizer_for(twin, arm), doubles[:4])
    assert_same(model, twin, **CLOSE)


def test_bfloat16_autocast_trains_with_factors(make_model, batches, arm) -> None:
    model = make_model()
    optimizer = optimizer_for(model, arm)
    for batch in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert optimizer.stats().served_share == (arm in LEARNED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("arm", SOME)
def test_models_of_other_dtypes_train_with_factors(make_model, batches, arm, dtype) -> None:
    model, before = make_model(dtype), make_model(dtype)
    optimizer = optimizer_for(model, arm, weight_decay=0.01)
    train(model, optimizer, [batch.to(dtype) for batch in batches])
    assert distance(model, before) > 0
    assert all(parameter.dtype == dtype and parameter.isfinite().all() for parameter in model.parameters())
    assert optimizer.stats().served_share == (arm in LEARNED)


def test_bfloat16_models_keep_their_state_in_float32(make_model, batches) -> None:
    model = make_model(torch.bfloat16)
    optimizer = optimizer_for(model, "slots")
    train(model, optimizer, [batch.bfloat16() for batch in batches[:2]])
    assert {value.dtype for entries in optimizer.state.values() for value in entries.values()} == {torch.float32}


def test_a_model_may_change_its_dtype_between_steps(make_model, batches, doubles, arm) -> None:
    model, twin = make_model(), make_model(torch.float64)
    optimizer = optimizer_for(model, arm)
    train(model, optimizer, batches[:4])
    model.double()
    train(model, optimizer, doubles[4:8])
    train(twin, optimizer_for(twin, arm), doubles[:8])
    # in float32 rounding errors reach the bases of directions with little variance
    assert_same(model, twin, **({"rtol": 0.0, "atol": 0.1} if arm in IN_EIGENBASIS else {"rtol": 1e-3, "atol": 1e-4}))


def test_the_default_dtype_is_immaterial(make_model, batches, arm) -> None:
    model, twin = make_model(), make_model()
    torch.set_default_dtype(torch.float64)
    try:
        train(model, optimizer_for(model, arm), batches)
    finally:
        torch.set_default_dtype(torch.float32)
    train(twin, optimizer_for(twin, arm), batches)
    # drawing random meta-parameters itself depends on the default dtype, so only the arms without a body are equal
    assert all(parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in model.parameters())
    if arm not in LEARNED:
        assert_same(model, twin, rtol=1e-4, atol=1e-5)
