"""Every scheduler of torch works on the learning rate, and those that cycle momentum on it too."""

from functools import partial

import pytest
import torch
from torch.optim import lr_scheduler

from tests.cases import SOME, assert_same, optimizer_for, train

SCHEDULERS = {
    "StepLR": partial(lr_scheduler.StepLR, step_size=2, gamma=0.5),
    "CosineAnnealingLR": partial(lr_scheduler.CosineAnnealingLR, T_max=12),
    "OneCycleLR": partial(lr_scheduler.OneCycleLR, max_lr=1.5, total_steps=12),
    "CyclicLR": partial(lr_scheduler.CyclicLR, base_lr=0.1, max_lr=1.0, step_size_up=3),
    "LambdaLR": partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
    "ReduceLROnPlateau": partial(lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.3, threshold=10.0),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4), lr_scheduler.ExponentialLR(optimizer, 0.8)],
        milestones=[4],
    ),
}


@pytest.mark.parametrize("make_scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("arm", SOME)
def test_schedulers_set_what_the_next_step_uses(make_model, batches, arm, make_scheduler) -> None:
    model, twin = make_model(), make_model()
    optimizer, by_hand = optimizer_for(model, arm), optimizer_for(twin, arm)
    scheduler = make_scheduler(optimizer)
    used = set()
    for batch in batches:
        (group,), (copied,) = optimizer.param_groups, by_hand.param_groups
        copied.update(lr=float(group["lr"]), momentum=group["momentum"])
        used.add(copied["lr"])
        loss = train(model, optimizer, [batch])
        train(twin, by_hand, [batch])
        scheduler.step(*[loss] * isinstance(scheduler, lr_scheduler.ReduceLROnPlateau))
    assert len(used) > 2
    assert_same(model, twin)


def test_a_scheduler_changes_a_tensor_lr_in_place(make_model, batches, arm) -> None:
    model, twin = make_model().double(), make_model().double()  # rounded otherwise, which a basis may amplify
    tensor, plain = optimizer_for(model, arm, lr=torch.tensor(1.0)), optimizer_for(twin, arm, lr=1.0)
    for each, optimizer in ((model, tensor), (twin, plain)):
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
        for batch in batches[:4]:
            train(each, optimizer, [batch.double()])
            scheduler.step()
    assert tensor.param_groups[0]["lr"].item() == plain.param_groups[0]["lr"] == 0.0625
    assert_same(model, twin, rtol=1e-9, atol=1e-12)
