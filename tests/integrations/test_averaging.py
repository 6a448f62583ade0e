"""Copies of the model inside the loop: weight averages, target networks, best models."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from gmn_optim import GMNOptimizer
from tests.cases import assert_same, count_hooks, distance, loss_of, snapshot, train
from tests.integrations.checks import assert_served, falls


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["mean", "moving"])
def test_averaged_models_average_and_disturb_nothing(make_model, batches, average) -> None:
    model, twin = make_model(), make_model()
    optimizer = GMNOptimizer(model)
    averaged, seen = AveragedModel(model, multi_avg_fn=average), []
    for batch in batches:
        train(model, optimizer, [batch])
        averaged.update_parameters(model)
        seen.append(snapshot(model))
        assert loss_of(averaged, batch).isfinite()  # a forward pass of the copy is not one of the model
    train(twin, GMNOptimizer(twin), batches)
    assert_same(model, twin)
    assert_served(optimizer, len(batches))
    if average is None:
        mean = {name: torch.stack([each[name] for each in seen]).mean(0) for name in seen[0]}
        assert_same(averaged.module, mean, rtol=1e-5, atol=1e-6)
    assert 0 < distance(averaged.module, model) < distance(make_model(), model)


def test_stochastic_weight_averaging_with_its_schedule_and_batch_norm(batches) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = GMNOptimizer(model)
    scheduler, averaged = SWALR(optimizer, swa_lr=0.1, anneal_epochs=3), AveragedModel(model)
    losses, lrs = [], []
    for batch in batches * 4:
        losses.append(train(model, optimizer, [batch]))
        averaged.update_parameters(model)
        scheduler.step()
        lrs.append(optimizer.param_groups[0]["lr"])
    update_bn(batches, averaged)
    assert falls(losses) and lrs[0] > lrs[1] > lrs[-1] == pytest.approx(0.1)
    assert_served(optimizer, 48)
    assert not torch.equal(averaged.module[1].running_mean, model[1].running_mean)
    assert loss_of(averaged, batches[0]) < losses[0]


def test_the_best_model_may_be_kept_and_put_back(make_model, batches) -> None:
    model, twin = make_model(), make_model()
    optimizer, best = GMNOptimizer(model), None
    for number, batch in enumerate(batches):
        train(model, optimizer, [batch])
        if number == 5:
            best = copy.deepcopy(model)
    kept = snapshot(best)
    model.load_state_dict(best.state_dict())
    train(twin, GMNOptimizer(twin), batches[:6])
    assert_same(best, kept)
    assert_same(model, twin)
    assert_served(optimizer, len(batches))
    train(model, optimizer, batches)
    assert_served(optimizer, 2 * len(batches))
    assert_same(best, kept)


def test_a_copy_gets_an_optimizer_of_its_own(make_model, batches) -> None:
    model, twin = make_model(), make_model()
    optimizer = GMNOptimizer(model)
    train(model, optimizer, batches[:6])
    branch, copied = copy.deepcopy((model, optimizer))
    fresh = copy.deepcopy(model)
    optimizers = {model: optimizer, branch: copied, fresh: GMNOptimizer(fresh)}
    for batch in batches[6:]:  # the copies train in turns with the original
        for each, its_own in optimizers.items():
            train(each, its_own, [batch])
    train(twin, GMNOptimizer(twin), batches)
    assert_same(model, twin)
    assert_same(branch, twin)
    for each, its_own in optimizers.items():
        assert_served(its_own, 6 if each is fresh else 12)
        assert count_hooks(each) == count_hooks(model)


def test_a_target_network_as_in_q_learning(batches) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer, target, losses = GMNOptimizer(network), copy.deepcopy(network), []
    for number, states in enumerate(batches * 6):
        with torch.no_grad():
            wanted = states.sum(1) + 0.5 * target(states.roll(1, 0)).amax(1)
        actions = torch.arange(8)[:, None] % 4
        loss = nn.functional.smooth_l1_loss(network(states).gather(1, actions)[:, 0], wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if number % 12 == 0:
            target.load_state_dict(network.state_dict())
        for slow, fast in zip(target.parameters(), network.parameters(), strict=True):
            slow.data.lerp_(fast.data, 0.05)
    assert falls(losses)
    assert_served(optimizer, 72)


def test_a_student_learns_from_a_teacher_that_is_its_moving_average(make_model, batches) -> None:
    model = make_model()
    optimizer, losses = GMNOptimizer(model), []
    teacher: AveragedModel = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for batch in batches * 3:
        optimizer.zero_grad()
        taught: Tensor = teacher(batch + 0.1)
        loss = loss_of(model, batch) + (model(batch - 0.1) - taught.detach()).square().mean()
        loss.backward()
        optimizer.step()
        teacher.update_parameters(model)
        losses.append(loss.item())
    assert falls(losses)
    assert_served(optimizer, 36)
