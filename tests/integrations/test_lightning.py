"""Lightning: automatic and manual optimization, accumulation, clipping, schedules, checkpoints and averages."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from gmn_optim import CaptureWarning, GMNOptimizer
from gmn_optim.errors import EvaluationModeError
from tests.cases import assert_equal_states, assert_same, distance, loss_of, mlp, snapshot, train
from tests.integrations.checks import assert_served, assert_unserved, falls

lightning = pytest.importorskip("lightning.pytorch")
callbacks = pytest.importorskip("lightning.pytorch.callbacks")

pytestmark = [
    pytest.mark.usefixtures("clean_folder"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers:UserWarning"),
]


class Regression(lightning.LightningModule):
    """A network trained as Lightning's documentation shows it.

    Args:
        schedule: Makes of an optimizer what ``configure_optimizers`` returns; None for the optimizer alone.
    """

    def __init__(self, schedule: Callable[[GMNOptimizer], Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network, self.schedule = mlp(), schedule
        self.losses: list[float] = []

    def forward(self, inputs: Tensor) -> Tensor:
        """Return outputs (b, 3)."""
        return self.network(inputs)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss ()."""
        loss = loss_of(self, batch[0])
        self.log("loss", loss)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        """Return the optimizer, alone or with a schedule."""
        self.optimizer = GMNOptimizer(self)
        return self.optimizer if self.schedule is None else self.schedule(self.optimizer)


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., lightning.Trainer]:
    """Return a function that makes a trainer, which is silent and keeps its files in ``tmp_path``."""

    def make(**options: Any) -> lightning.Trainer:
        quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
        return lightning.Trainer(accelerator="cpu", default_root_dir=tmp_path, **{**quiet, **options})

    return make


def load(batches: list[Tensor], size: int = 8) -> DataLoader:
    """Return a loader of all data points in their order."""
    return DataLoader(TensorDataset(torch.cat(batches)), batch_size=size)


def test_automatic_optimization_equals_the_plain_loop(make_trainer, batches) -> None:
    module, plain = Regression(), Regression()
    make_trainer(max_epochs=3).fit(module, load(batches))
    train(plain, GMNOptimizer(plain), batches * 3)
    assert_same(module, plain)
    assert falls(module.losses)
    assert_served(module.optimizer, 36)


def test_a_last_partial_batch_is_served(make_trainer, batches) -> None:
    module, plain = Regression(), Regression()
    make_trainer(max_epochs=2).fit(module, load(batches, size=36))  # 36, 36 and 24 data points
    train(plain, GMNOptimizer(plain), [*torch.cat(batches).split(36)] * 2)
    assert_same(module, plain)
    assert_served(module.optimizer, 6)


def test_accumulated_batches_equal_the_plain_loop(make_trainer, batches) -> None:
    module, plain = Regression(), Regression()
    make_trainer(max_epochs=2, accumulate_grad_batches=4).fit(module, load(batches[:10]))  # 4, 4 and 2 batches
    optimizer = GMNOptimizer(plain)
    for start in [0, 4, 8] * 2:
        optimizer.zero_grad()
        for batch in batches[start : min(start + 4, 10)]:
            (loss_of(plain, batch) / 4).backward()
        optimizer.step()
    assert_same(module, plain)
    assert_served(module.optimizer, 6)


def test_clipped_norms_equal_the_plain_loop(make_trainer, batches) -> None:
    module, plain, free = Regression(), Regression(), Regression()
    make_trainer(max_epochs=1, gradient_clip_val=0.05).fit(module, load(batches))
    optimizer = GMNOptimizer(plain)
    for batch in batches:
        optimizer.zero_grad()
        loss_of(plain, batch).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        optimizer.step()
    train(free, GMNOptimizer(free), batches)
    assert_same(module, plain, rtol=1e-5, atol=1e-6)
    assert distance(module, free) > 0
    assert_served(module.optimizer, len(batches))


def test_clipped_values_are_said_once(make_trainer, batches) -> None:
    module = Regression()
    trainer = make_trainer(max_epochs=3, gradient_clip_val=1e-3, gradient_clip_algorithm="value")
    with pytest.warns(CaptureWarning, match="changed unevenly") as caught:
        trainer.fit(module, load(batches))
    assert sum(each.category is CaptureWarning for each in caught) == 1
    assert falls(module.losses)
    assert_unserved(module.optimizer, snapshot(module), "changed unevenly")


SCHEDULES = {
    "pair of lists": (lambda o: ([o], [torch.optim.lr_scheduler.StepLR(o, 1, 0.5)]), 0.125),
    "of epochs": (
        lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(o, 1, 0.5)}},
        0.125,
    ),
    "of steps": (
        lambda o: {
            "optimizer": o,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(o, 36), "interval": "step"},
        },
        0.0,
    ),
    "one cycle": (
        lambda o: {
            "optimizer": o,
            "lr_scheduler": {
                "scheduler": torch.optim.lr_scheduler.OneCycleLR(o, max_lr=2.0, total_steps=37),
                "interval": "step",
            },
        },
        8e-6,
    ),
    "on a plateau": (
        lambda o: {
            "optimizer": o,
            "lr_scheduler": {
                "scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5, threshold=10.0),
                "monitor": "loss",
            },
        },
        0.125,
    ),
}


@pytest.mark.parametrize(("schedule", "final"), SCHEDULES.values(), ids=SCHEDULES)
def test_schedules_work_on_the_learning_rate(make_trainer, batches, schedule, final) -> None:
    module, plain = Regression(schedule=schedule), Regression()
    make_trainer(max_epochs=3).fit(module, load(batches))
    train(plain, GMNOptimizer(plain), batches * 3)
    assert module.optimizer.param_groups[0]["lr"] == pytest.approx(final, abs=1e-2 * final + 1e-12)
    assert distance(module, plain) > 1e-4 and falls(module.losses)
    assert_served(module.optimizer, 36)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions_are_served(make_trainer, batches, precision) -> None:
    module = Regression()
    make_trainer(max_epochs=3, precision=precision).fit(module, load(batches))
    assert falls(module.losses)
    assert_served(module.optimizer, 36)


def test_validation_between_steps_changes_nothing(make_trainer, batches) -> None:
    class Validated(Regression):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            """Log the loss."""
            self.log("validation", loss_of(self, batch[0]))

    module, plain = Validated(), Regression()
    trainer = make_trainer(max_epochs=2, val_check_interval=3, num_sanity_val_steps=2)
    trainer.fit(module, load(batches), load(batches[:2]))
    train(plain, GMNOptimizer(plain), batches * 2)
    assert trainer.callback_metrics["validation"].isfinite()
    assert_same(module, plain)
    assert_served(module.optimizer, 24)


@pytest.mark.usefixtures("averaged_steps")
def test_averages_are_validated_where_hooks_ask_for_them(make_trainer, batches) -> None:
    class Averaged(Regression):
        validated: list[dict[str, Tensor]] = []

        def on_validation_start(self) -> None:
            """Go to the averages."""
            self.optimizers().eval()

        def on_validation_end(self) -> None:
            """Go on with the training."""
            self.optimizers().train()

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            """Keep what is evaluated."""
            self.validated.append(snapshot(self))

    class Forgetful(Averaged):
        def on_validation_end(self) -> None:
            """Forget it."""

    with pytest.raises(EvaluationModeError):
        make_trainer(max_epochs=2, num_sanity_val_steps=0).fit(Forgetful(), load(batches), load(batches[:1]))
    module, plain = Averaged(), Regression()
    module.validated.clear()
    make_trainer(max_epochs=2, num_sanity_val_steps=0).fit(module, load(batches), load(batches[:1]))
    optimizer = GMNOptimizer(plain)
    for averaged in module.validated:
        train(plain, optimizer, batches)
        assert distance(plain, averaged) > 0
        optimizer.eval()
        assert_same(plain, averaged)
        optimizer.train()
    assert_same(module, plain)
    assert len(module.validated) == 2


# ---------------------------------------------------------------------- modules called in parts


class InParts(Regression):
    """A module whose ``training_step`` calls its network, not itself."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss ()."""
        return loss_of(self.network, batch[0])


class InPartsGivenTheNetwork(InParts):
    """The same, with the network given to the optimizer."""

    def configure_optimizers(self) -> GMNOptimizer:
        """Return the optimizer."""
        self.optimizer = GMNOptimizer(self.network)
        return self.optimizer


@pytest.mark.parametrize("kind", [InParts, InPartsGivenTheNetwork])
def test_a_network_called_by_its_own_name_is_served(make_trainer, batches, kind) -> None:
    module = kind()
    before = loss_of(module, batches[0]).item()
    make_trainer(max_epochs=3).fit(module, load(batches))
    assert loss_of(module, batches[0]).item() < 0.8 * before
    assert_served(module.optimizer, 36)


@pytest.mark.parametrize("kind", [InParts, InPartsGivenTheNetwork])
def test_a_network_called_by_its_own_name_moves_as_in_the_plain_loop(make_trainer, batches, kind) -> None:
    module, plain = kind(), Regression()
    make_trainer(max_epochs=2).fit(module, load(batches))
    train(plain, GMNOptimizer(plain), batches * 2)
    assert_served(module.optimizer, 24)
    assert_same(module, plain)


# ---------------------------------------------------------------------- manual optimization


class Manual(Regression):
    """A module that steps by itself, every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Accumulate over two batches."""
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        loss = loss_of(self, batch[0])
        self.manual_backward(loss / 2)
        self.losses.append(loss.item())
        if batch_idx % 2:
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()

    def configure_optimizers(self) -> Any:
        """Return the optimizer and a schedule."""
        self.optimizer = GMNOptimizer(self)
        return [self.optimizer], [torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)]


def test_manual_optimization_equals_the_plain_loop(make_trainer, batches) -> None:
    module, plain = Manual(), Regression()
    make_trainer(max_epochs=3).fit(module, load(batches))
    optimizer = GMNOptimizer(plain)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for one, other in zip(batches[::2] * 3, batches[1::2] * 3, strict=True):
        optimizer.zero_grad()
        for batch in (one, other):
            (loss_of(plain, batch) / 2).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
    assert_same(module, plain, rtol=1e-5, atol=1e-6)
    assert falls(module.losses)
    assert_served(module.optimizer, 18)


class Adversaries(lightning.LightningModule):
    """A GAN as in Lightning's documentation: two optimizers, toggled, one of them with a closure."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 5))
        self.critic = nn.Sequential(nn.Linear(5, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
        self.automatic_optimization, self.gaps = False, []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Let both take a step."""
        of_generator, of_critic = self.optimizers()
        score = nn.functional.binary_cross_entropy_with_logits
        real = batch[0] * 0.1 + 1.0
        self.toggle_optimizer(of_generator)
        fake = self.generator(torch.randn(len(real), 4))
        judged = self.critic(fake)
        of_generator.zero_grad()
        self.manual_backward(score(judged, torch.ones_like(judged)))
        of_generator.step()
        self.untoggle_optimizer(of_generator)

        def closure() -> Tensor:
            judged_real, judged_fake = self.critic(real), self.critic(fake.detach())
            loss = score(judged_real, torch.ones_like(judged_real)) + score(judged_fake, torch.zeros_like(judged_fake))
            of_critic.zero_grad()
            self.manual_backward(loss)
            return loss

        with of_critic.toggle_model():
            of_critic.step(closure)
        self.gaps.append((fake.mean(0) - real.mean(0)).norm().item())

    def configure_optimizers(self) -> list[GMNOptimizer]:
        """Return one optimizer for each network."""
        self.both = [GMNOptimizer(self.generator, lr=0.5), GMNOptimizer(self.critic, lr=0.5)]
        return self.both


def test_two_optimizers_toggled_by_hand_are_served(make_trainer, batches) -> None:
    module = Adversaries()
    make_trainer(max_epochs=8).fit(module, load(batches))
    assert min(module.gaps) < 0.6 * module.gaps[0]
    for optimizer in module.both:
        assert_served(optimizer, 96)


# ---------------------------------------------------------------------- checkpoints and copies


def test_a_checkpoint_resumes_bit_by_bit(make_trainer, batches, tmp_path) -> None:
    schedule = SCHEDULES["of steps"][0]
    whole, first, second = (Regression(schedule=schedule) for _ in range(3))
    make_trainer(max_epochs=4).fit(whole, load(batches))
    trainer = make_trainer(max_epochs=2)
    trainer.fit(first, load(batches))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    nn.init.zeros_(second.network[0].weight)
    make_trainer(max_epochs=4).fit(second, load(batches), ckpt_path=tmp_path / "half.ckpt")
    assert_same(second, whole)
    assert_equal_states(second.optimizer.state_dict(), whole.optimizer.state_dict())
    assert distance(first, whole) > 0
    assert_served(second.optimizer, 24)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_the_checkpoint_callback_keeps_what_a_new_trainer_continues(make_trainer, batches, tmp_path) -> None:
    def make_saver() -> callbacks.ModelCheckpoint:
        return callbacks.ModelCheckpoint(tmp_path / "kept", save_last=True, monitor="loss")

    whole, first, second = Regression(), Regression(), Regression()
    make_trainer(max_epochs=3).fit(whole, load(batches))
    make_trainer(max_epochs=2, callbacks=[make_saver()], enable_checkpointing=True).fit(first, load(batches))
    trainer = make_trainer(max_epochs=3, callbacks=[make_saver()], enable_checkpointing=True)
    trainer.fit(second, load(batches), ckpt_path="last")
    assert_same(second, whole)
    assert_served(second.optimizer, 12)


def test_a_module_loads_from_a_checkpoint_without_hooks(make_trainer, batches, tmp_path) -> None:
    module, trainer = Regression(), make_trainer(max_epochs=1)
    trainer.fit(module, load(batches))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    content = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert set(content["state_dict"]) == set(snapshot(module))
    loaded = Regression.load_from_checkpoint(tmp_path / "end.ckpt")
    assert_same(loaded, module)
    make_trainer(max_epochs=1).fit(loaded, load(batches))
    assert_served(loaded.optimizer, len(batches))


AVERAGES = {
    "moving": lambda: callbacks.WeightAveraging(avg_fn=get_ema_avg_fn(0.9)),
    "stochastic": lambda: callbacks.StochasticWeightAveraging(swa_lrs=0.5, swa_epoch_start=2),
}


def test_a_copied_module_trains_in_a_trainer_of_its_own(make_trainer, batches) -> None:
    module, twin = Regression(), Regression()
    make_trainer(max_epochs=1).fit(module, load(batches))
    kept, copied = snapshot(module), copy.deepcopy(module)
    make_trainer(max_epochs=1).fit(copied, load(batches))
    make_trainer(max_epochs=1).fit(twin, load(batches))
    make_trainer(max_epochs=1).fit(twin, load(batches))
    assert_same(module, kept)
    assert_same(copied, twin)
    assert_served(copied.optimizer, 12)


@pytest.mark.parametrize("make_callback", AVERAGES.values(), ids=AVERAGES)
def test_callbacks_that_average_a_copy_are_served(make_trainer, batches, make_callback) -> None:
    module, plain = Regression(), Regression()
    make_trainer(max_epochs=4, callbacks=[make_callback()]).fit(module, load(batches))
    train(plain, GMNOptimizer(plain), batches * 4)
    assert falls(module.losses)
    assert distance(module, plain) > 1e-4
    assert_served(module.optimizer, 48)


def test_layers_thawed_by_a_callback_are_served(make_trainer, batches) -> None:
    class Thaw(callbacks.BaseFinetuning):
        def freeze_before_training(self, module: Regression) -> None:
            """Freeze the first layer."""
            self.freeze(module.network[0])

        def finetune_function(self, module: Regression, epoch: int, optimizer: torch.optim.Optimizer) -> None:
            """Thaw it after the first epoch, as a group of its own."""
            if epoch == 1:
                self.unfreeze_and_add_param_group(module.network[0], optimizer, lr=0.5)

    class Finetuned(Regression):
        def configure_optimizers(self) -> GMNOptimizer:
            """Return an optimizer of what is not frozen."""
            self.optimizer = GMNOptimizer(self, [p for p in self.parameters() if p.requires_grad])
            return self.optimizer

    module = Finetuned()
    before = snapshot(module)
    make_trainer(max_epochs=3, callbacks=[Thaw()]).fit(module, load(batches))
    assert falls(module.losses)
    assert [group["lr"] for group in module.optimizer.param_groups] == [1.0, 0.5]
    assert module.optimizer.state[module.network[0].weight]["step"].item() == 24
    assert all(not torch.equal(value, before[name]) for name, value in snapshot(module).items())
    assert_served(module.optimizer, 36)
