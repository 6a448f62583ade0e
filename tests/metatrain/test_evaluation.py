import pytest
import torch

from gmn_optim.metatrain import Curves, Unroll, evaluate
from gmn_optim.metatrain.baselines import tune
from gmn_optim.rule import RuleConfig, UpdateRule
from gmn_optim.tasks import tasks
from gmn_optim.tasks.quadratic import QuadraticTask


def test_a_seed_gives_the_same_curve_whatever_stands_beside_it():
    unroll = Unroll(QuadraticTask(), UpdateRule(RuleConfig(body=None)))
    meta = unroll.meta_parameters()
    together = evaluate(unroll, meta, [4, 5, 6], every=5)
    alone = evaluate(unroll, meta, [5], every=5)
    torch.testing.assert_close(together.held_out[:, 1], alone.held_out[:, 0])
    assert together.steps.tolist() == [0, 5, 10, 15, 20]


def test_averages_are_measured_where_steps_are_averaged_and_asked_for():
    unroll = Unroll(tasks["quadratic"](), UpdateRule(RuleConfig(nominal="kronecker_schedule_free", body=None)))
    meta = unroll.meta_parameters()
    plain, averaged = (evaluate(unroll, meta, [1, 2], every=5, averages=each) for each in (False, True))
    assert torch.equal(plain.training[1:], averaged.training[1:])
    assert torch.equal(plain.held_out[0], averaged.held_out[0])
    assert not (plain.held_out[1:] == averaged.held_out[1:]).any()


def test_curves_tell_when_a_target_is_reached():
    curves = Curves(torch.tensor([0, 10, 20]), torch.tensor([[3.0, 3.0], [1.0, 2.0], [2.0, 0.5]]), torch.zeros(3, 2))
    assert curves.steps_to(1.5).item() == 10
    assert curves.steps_to_each(1.5).tolist() == [10, 20]
    assert curves.steps_to(0.1).item() == torch.inf
    assert curves.steps_to_each(0.6).tolist() == [torch.inf, 20]
    assert curves.best().tolist() == [1.0, 0.5]


def test_tuning_finds_the_step_size_that_a_search_by_hand_finds():
    task = QuadraticTask(noise=0.0, horizon=20)
    lrs = [0.001, 0.03, 0.1, 100.0]
    found = tune(task, "momentum", [1, 2], lrs=lrs, every=5)
    ends = []
    for lr in lrs:
        unroll = Unroll(task, UpdateRule(RuleConfig(body=None, alpha=lr)))
        ends.append(evaluate(unroll, unroll.meta_parameters(), [1, 2], every=5).held_out.mean(1).min().item())
    assert found.lr == lrs[ends.index(min(ends))]
    assert found.test.held_out.mean(1).min().item() == pytest.approx(min(ends), rel=1e-4)


def test_training_and_held_out_images_do_not_overlap():
    task = tasks["fashion-mnist-mlp"]()
    validation, test = task.held_out("validation"), task.held_out("test")
    assert len(validation[1]) == 5_000 and len(test[1]) == 10_000
    assert len(task.data.train.targets) == 55_000


def test_adam_on_fashion_mnist_trains_as_torch_does():
    task = tasks["fashion-mnist-mlp"]()
    unroll = Unroll(task, UpdateRule(RuleConfig(nominal="adam", body=None, alpha=0.005)))
    generator = torch.Generator().manual_seed(2)
    state = unroll.start(generator, 1)
    parameters = {n: p.clone().requires_grad_() for n, p in unroll.unflatten([f[0] for f in state.parameters]).items()}
    batches = unroll.batches(generator, 30, 1)
    _, losses = unroll.run(unroll.meta_parameters(), state, batches)
    optimizer = torch.optim.Adam(parameters.values(), lr=0.005)
    for step in range(30):
        loss = task.loss(parameters, tuple(part[step, 0] for part in batches))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert losses[step, 0].item() == pytest.approx(loss.item(), rel=1e-4)
