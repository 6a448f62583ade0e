"""Hooks go with their optimizer, and several optimizers and models do not get mixed up."""

import gc

import pytest
import torch
from torch import nn

from gmn_optim import GMNOptimizer
from tests.cases import (
    IN_EIGENBASIS,
    LEARNED,
    WITH_FACTORS,
    assert_same,
    count_hooks,
    distance,
    loss_of,
    make_rule,
    optimizer_for,
    snapshot,
    train,
    without_learned_term,
)


@pytest.mark.parametrize("leave", ["close", "with", "delete"])
@pytest.mark.parametrize("arm", WITH_FACTORS)
def test_no_hook_outlives_the_optimizer(make_model, batches, arm, leave) -> None:
    model = make_model()
    keys = list(model.state_dict())
    optimizer = optimizer_for(model, arm)
    assert count_hooks(model) > 0
    train(model, optimizer, batches[:2])
    gc.disable()
    try:
        if leave == "close":
            optimizer.close()
            optimizer.close()
        elif leave == "with":
            with optimizer:
                train(model, optimizer, batches[2:3])
        else:
            del optimizer
        assert count_hooks(model) == 0 and list(model.state_dict()) == keys
    finally:
        gc.enable()


def test_a_closed_optimizer_takes_the_nominal_term(make_model, batches) -> None:
    model, twin, rule = make_model(), make_model(), make_rule("slots")
    with GMNOptimizer(model, weights=rule) as closed:
        pass
    train(model, closed, batches)
    train(twin, GMNOptimizer(twin, weights=without_learned_term(rule)), batches)
    assert_same(model, twin, rtol=1e-6, atol=1e-7)
    assert {row.because for row in closed.summary().rows} == {"the optimizer is closed"}


@pytest.mark.parametrize("arm", LEARNED)
def test_several_optimizers_serve_one_model(make_model, batches, arm) -> None:
    model, alone = make_model(), make_model()
    lower, upper = list(model[0].parameters()), list(model[2:].parameters())
    optimizers = [optimizer_for(model, arm, params=part) for part in (lower, upper)]
    both = optimizer_for(alone, arm, params=[{"params": alone[0].parameters()}, {"params": alone[2:].parameters()}])
    for batch in batches:
        model.zero_grad()
        loss_of(model, batch).backward()
        for optimizer in optimizers:
            optimizer.step()
        train(alone, both, [batch])
    assert [optimizer.stats().served_share for optimizer in optimizers] == [1.0, 1.0]
    if arm not in WITH_FACTORS and arm not in IN_EIGENBASIS:  # each sees its own layers and counts them only
        assert_same(model, alone, rtol=1e-4, atol=1e-5)


def test_two_models_train_each_other(arm) -> None:
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5))
    critic = nn.Sequential(nn.Linear(5, 6), nn.LeakyReLU(0.2), nn.Linear(6, 1))
    of_generator, of_critic = optimizer_for(generator, arm), optimizer_for(critic, arm)
    score = nn.functional.binary_cross_entropy_with_logits
    before = snapshot(generator), snapshot(critic)
    for _ in range(8):
        real, fake = critic(torch.randn(8, 5)), critic(generator(torch.randn(8, 4)).detach())
        of_critic.zero_grad()
        (score(real, torch.ones_like(real)) + score(fake, torch.zeros_like(fake))).backward()
        of_critic.step()
        of_generator.zero_grad()
        judged = critic(generator(torch.randn(8, 4)))
        score(judged, torch.ones_like(judged)).backward()
        of_generator.step()
    for model, optimizer, start in zip((generator, critic), (of_generator, of_critic), before, strict=True):
        assert distance(model, start) > 0 and optimizer.stats().served_share == (arm in LEARNED)


def test_arms_without_factors_put_no_hook_on_the_model(make_model, arm) -> None:
    model = make_model()
    optimizer = optimizer_for(model, arm)
    assert (count_hooks(model) > 0) == make_rule(arm).reads_factors, optimizer
