"""Accelerate: everything through ``prepare``, accumulation, clipping, mixed precision and saved states."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gmn_optim import CaptureWarning, GMNOptimizer
from tests.cases import assert_equal_states, assert_same, distance, loss_of, snapshot, train
from tests.integrations.checks import assert_served, assert_unserved, falls

accelerate = pytest.importorskip("accelerate")

pytestmark = pytest.mark.usefixtures("fresh_accelerate", "clean_folder")


class Setup:
    """A model and what ``prepare`` makes of it, its optimizer, a loader and a schedule.

    Args:
        model: The model.
        batches: What the loader yields, all of it once for each round.
        options: Of the accelerator.
    """

    def __init__(self, model: nn.Module, batches: list[Tensor], **options: Any) -> None:
        self.accelerator = accelerate.Accelerator(cpu=True, **options)
        self.plain = GMNOptimizer(model)
        schedule = torch.optim.lr_scheduler.StepLR(self.plain, 5, 0.5)
        loader = DataLoader(torch.cat(batches), batch_size=8)
        self.model, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(
            model, self.plain, loader, schedule
        )

    def train(self, rounds: int = 1, clip: Callable[[Any, Any], object] | None = None) -> list[float]:
        """Train as Accelerate's documentation shows it, and return the losses.

        Args:
            rounds: How often each batch is seen.
            clip: Called with the accelerator and the parameters before each step.
        """
        losses = []
        for batch in (batch for _ in range(rounds) for batch in self.loader):
            with self.accelerator.accumulate(self.model):
                loss = loss_of(self.model, batch)
                self.accelerator.backward(loss)
                if clip is not None and self.accelerator.sync_gradients:
                    clip(self.accelerator, self.model.parameters())
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses


def train_plainly(
    model: nn.Module, batches: list[Tensor], accumulated: int = 1, norm: float | None = None
) -> GMNOptimizer:
    """Train without Accelerate."""
    optimizer = GMNOptimizer(model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)
    for start in range(0, len(batches), accumulated):
        for batch in batches[start : start + accumulated]:
            (loss_of(model, batch) / accumulated).backward()
        if norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return optimizer


def test_what_prepare_returns_equals_the_plain_loop(make_model, batches) -> None:
    model, twin = make_model(), make_model()
    setup = Setup(model, batches)
    losses = setup.train(rounds=2)
    train_plainly(twin, batches * 2)
    assert_same(model, twin)
    assert falls(losses) and setup.optimizer.param_groups[0]["lr"] == 0.5**4
    assert_served(setup.plain, 24)


def test_accumulate_equals_the_plain_loop(make_model, batches) -> None:
    model, twin = make_model(), make_model()
    setup = Setup(model, batches, gradient_accumulation_steps=3)
    setup.train(rounds=2)
    train_plainly(twin, batches * 2, accumulated=3)
    assert_same(model, twin)
    assert_served(setup.plain, 8)


def test_clipped_norms_equal_the_plain_loop(make_model, batches) -> None:
    model, twin, free = make_model(), make_model(), make_model()
    setup = Setup(model, batches, gradient_accumulation_steps=2)
    setup.train(clip=lambda accelerator, parameters: accelerator.clip_grad_norm_(parameters, 0.05))
    train_plainly(twin, batches, accumulated=2, norm=0.05)
    train_plainly(free, batches, accumulated=2)
    assert_same(model, twin)
    assert distance(model, free) > 0
    assert_served(setup.plain, 6)


def test_clipped_values_are_said_once(make_model, batches) -> None:
    model = make_model()
    setup = Setup(model, batches)
    with pytest.warns(CaptureWarning, match="changed unevenly") as caught:
        losses = setup.train(3, clip=lambda accelerator, parameters: accelerator.clip_grad_value_(parameters, 1e-3))
    assert len(caught) == 1 and losses[-1] < losses[0]
    assert_unserved(setup.plain, snapshot(model), "changed unevenly")


def test_bfloat16_on_the_cpu_is_served(make_model, batches) -> None:
    model, twin = make_model(), make_model()
    setup = Setup(model, batches, mixed_precision="bf16", gradient_accumulation_steps=2)
    dtypes = []
    handle = model[0].register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    losses = setup.train(rounds=4, clip=lambda accelerator, parameters: accelerator.clip_grad_norm_(parameters, 1.0))
    handle.remove()
    assert set(dtypes) == {torch.bfloat16} and all(each.dtype == torch.float32 for each in model.parameters())
    assert falls(losses)
    assert_served(setup.plain, 24)
    train_plainly(twin, batches * 4, accumulated=2, norm=1.0)
    assert 0 < distance(model, twin) < 0.05


def test_the_optimizer_may_be_made_of_the_prepared_model(make_model, batches) -> None:
    model, twin = make_model(), make_model()
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(model)
    plain = GMNOptimizer(prepared)
    optimizer = accelerator.prepare(plain)
    for batch in batches:
        optimizer.zero_grad()
        accelerator.backward(loss_of(prepared, batch))
        optimizer.step()
    setup = Setup(twin, batches, mixed_precision="bf16")
    setup.schedule = accelerate.scheduler.AcceleratedScheduler(
        torch.optim.lr_scheduler.ConstantLR(setup.plain, 1.0), setup.optimizer
    )
    setup.train()
    assert_same(model, twin)
    assert_served(plain, len(batches))


@pytest.mark.usefixtures("averaged_steps")
def test_averages_are_there_for_evaluation(make_model, batches) -> None:
    model, twin = make_model(), make_model()
    setup = Setup(model, batches)
    setup.train()
    plain = train_plainly(twin, batches)
    for each in (setup.optimizer, plain):
        each.eval()
    assert_same(model, twin)
    averaged = snapshot(model)
    setup.optimizer.train()
    assert distance(model, averaged) > 0
    setup.train()


def test_a_closure_goes_through(make_model, batches) -> None:
    model, twin = make_model(), make_model()
    setup = Setup(model, batches)

    def pass_over(batch: Tensor) -> Tensor:
        setup.optimizer.zero_grad()
        loss = loss_of(setup.model, batch)
        setup.accelerator.backward(loss)
        return loss

    for batch in setup.loader:
        setup.optimizer.step(partial(pass_over, batch))
    train(twin, GMNOptimizer(twin), batches)
    assert_same(model, twin)
    assert_served(setup.plain, len(batches))


def test_a_saved_state_resumes_bit_by_bit(make_model, batches, tmp_path) -> None:
    whole, first, second = make_model(), make_model(), make_model(seed=1)
    complete = Setup(whole, batches)
    complete.train(rounds=2)
    half = Setup(first, batches)
    half.train()
    half.accelerator.save_state(str(tmp_path / "half"))
    resumed = Setup(second, batches)
    resumed.accelerator.load_state(str(tmp_path / "half"))
    resumed.train()
    assert_same(second, whole)
    assert_equal_states(resumed.plain.state_dict(), complete.plain.state_dict())
    assert_served(resumed.plain, 12)


def test_two_models_are_prepared_together(batches) -> None:
    torch.manual_seed(0)
    accelerator = accelerate.Accelerator(cpu=True)
    generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 5))
    critic = nn.Sequential(nn.Linear(5, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    plain = [GMNOptimizer(model, lr=0.3) for model in (generator, critic)]
    generator, critic, of_generator, of_critic = accelerator.prepare(generator, critic, *plain)
    gaps, score = [], nn.functional.softplus
    for batch in batches * 4:
        real, fake = batch * 0.1 + 1.0, generator(torch.randn(8, 4))
        of_critic.zero_grad()
        accelerator.backward((score(-critic(real)) + score(critic(fake.detach()))).mean())
        of_critic.step()
        of_generator.zero_grad()
        accelerator.backward(score(-critic(fake)).mean())
        of_generator.step()
        gaps.append((fake.mean(0) - real.mean(0)).norm().item())
    assert min(gaps) < 0.6 * gaps[0]
    for optimizer in plain:
        assert_served(optimizer, 48)
