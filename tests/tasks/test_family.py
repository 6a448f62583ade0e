"""The default family draws every kind of task, from the generator alone, and only from what meta-training may see."""

import re
from collections.abc import Callable

import pytest
import torch

from gmn_optim.metatrain import Unroll
from gmn_optim.rule import RuleConfig, UpdateRule
from gmn_optim.tasks import AbstractTask, families, meta_validation_tasks, mixture, tasks
from gmn_optim.tasks.data_folder import VARIABLE
from gmn_optim.tasks.datasets import load_fashion_mnist_8x8, load_fashion_mnist_14x14, load_letters

DRAWS = 300
KINDS = {
    "fmnist-mlp": r"fmnist(7|8|10|14)FEW-mlp(-\d+){1,4}-(relu|tanh|gelu|silu)-b\d+",
    "letters-mlp": r"lettersFEW-mlp(-\d+){1,3}-(relu|tanh|gelu|silu)-b\d+",
    "inpainting": r"fmnist(8|10|14)FEW-inpainting(-\d+){1,2}-(relu|tanh|gelu|silu)-b\d+",
    "autoencoder": r"fmnist(7|8|10|14)-autoencoder-\d+(-\d+-\d+)?-(relu|tanh|gelu|silu)-b\d+",
    "siren": r"(coffee|chelsea|rocket)-siren(-\d+){1,3}-b\d+",
    "fourier": r"(coffee|chelsea|rocket)-fourier(-\d+){1,3}-b\d+",
    "cnn": r"fmnist(8|14)-cnn(-\d+){2,3}-(stride|max|average)-(mean|flatten)-(relu|tanh|gelu|silu)-b\d+",
    "transformer": r"austen-transformer-[12]x\d+-h[124]-c\d+-b\d+",
}
FEW = r"(x\d{3,4})?"
CHANGES = r"(-w\d\.\d\d)?(-x\d\.\d\d)?(-n0\.\d\d)?"


@pytest.fixture(scope="module", name="drawn")
def fixture_drawn() -> list[AbstractTask]:
    """Return many tasks of the family."""
    family, generator = families["default"](), torch.Generator().manual_seed(0)
    return [family.sample(generator) for _ in range(DRAWS)]


def of_kind(drawn: list[AbstractTask], kind: str) -> list[AbstractTask]:
    """Return the tasks whose name is of a kind."""
    pattern = KINDS[kind].replace("FEW", FEW) + CHANGES
    return [task for task in drawn if re.fullmatch(pattern, task.name)]


def test_every_kind_is_drawn_and_named(drawn: list[AbstractTask]) -> None:
    counts = {kind: len(of_kind(drawn, kind)) for kind in KINDS}
    assert min(counts.values()) > 0 and sum(counts.values()) == DRAWS, counts
    assert 0.35 < counts["fmnist-mlp"] / DRAWS < 0.55


def test_a_quarter_of_classifiers_and_regressions_see_few_examples(drawn: list[AbstractTask]) -> None:
    may = [task for kind in ("fmnist-mlp", "letters-mlp", "inpainting") for task in of_kind(drawn, kind)]
    few = {task: int(m[1]) for task in may if (m := re.match(r"[a-z]+\d*x(\d+)-", task.name))}
    assert 0.15 < len(few) / len(may) < 0.35
    for task, number in few.items():
        # the last training examples are held out for the meta-loss
        assert 800 <= number <= 5_000 and len(task.data.train.inputs) <= number


def test_tasks_are_small_and_bounded(drawn: list[AbstractTask]) -> None:
    for task in drawn:
        assert sum(parameter.numel() for parameter in task.module.parameters()) <= mixture.PARAMETER_LIMIT
        assert 2 <= task.batch_size <= 256 and 0 < task.loss_floor < 0.1 and task.loss_limit >= 2.9


@pytest.mark.parametrize(
    ("letter", "share", "low", "high"), [("w", 1 / 3, 0.5, 2), ("x", 0.3, 0.5, 2), ("n", 1 / 8, 0, 0.2)]
)
def test_some_tasks_are_changed(drawn: list[AbstractTask], letter: str, share: float, low: float, high: float) -> None:
    found = [float(m[1]) for task in drawn if (m := re.search(rf"-{letter}(\d\.\d\d)", task.name))]
    assert share / 2 < len(found) / DRAWS < 2 * share and low <= min(found) and max(found) <= high


def test_draws_come_from_the_generator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    family, before = families["default"](), torch.get_rng_state()

    def draw(seed: int) -> tuple[str, list[torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        task = family.sample(generator)
        return task.name, [*task.sample_batch(generator), *task.init_parameters(generator).values()]

    for seed in range(12):
        first, second = draw(seed), draw(seed)
        assert first[0] == second[0]
        torch.testing.assert_close(first[1], second[1], rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_draw_holds_data_of_validation_or_test_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[object] = set()

    def noted(load: Callable) -> Callable:
        return lambda key: seen.add(key) or load(key)

    for name in ("load_text", "load_photograph", "family_images"):
        monkeypatch.setattr(mixture, name, noted(getattr(mixture, name)))
    family, generator = families["default"](), torch.Generator().manual_seed(1)
    for _ in range(200):
        family.sample(generator)
    assert seen == {"austen", "coffee", "chelsea", "rocket", 7, 8, 10, 14}


def test_images_and_letters_are_parted() -> None:
    """Meta-training has the first ones, validation tasks the next ones; neither has the published test part."""
    for side, whole in ((8, load_fashion_mnist_8x8()), (14, load_fashion_mnist_14x14())):
        data = mixture.family_images(side)
        assert torch.equal(torch.cat([data.train_images, data.test_images]), whole.train_images[:20_000])
    data, letters = meta_validation_tasks.validation_images(14), load_letters()
    assert torch.equal(torch.cat([data.train_images, data.test_images]), whole.train_images[20_000:30_000])
    for data, place in (
        (mixture.family_letters(), slice(10_000)),
        (meta_validation_tasks.validation_letters(), slice(10_000, 16_000)),
        (meta_validation_tasks.validation_letters(1_600), slice(10_000, 11_600)),
    ):
        assert torch.equal(torch.cat([data.train_features, data.test_features]), letters.train_features[place])


def test_fixed_tasks_are_registered_under_their_names() -> None:
    family = families["default"]()
    assert len(family.validation) >= 8 and len(family.test) >= 10
    assert not set(family.validation) & set(family.test)
    assert {*family.validation, *family.test} <= set(tasks)
    assert all(tasks[name]().name == name for name in family.validation)


@pytest.mark.parametrize("kind", list(KINDS))
def test_unrolls_of_each_kind_stay_finite(drawn: list[AbstractTask], kind: str) -> None:
    for task in of_kind(drawn, kind)[:2]:
        unroll, generator = Unroll(task, UpdateRule(RuleConfig(nominal="kronecker_adam", body=None))), torch.Generator()
        _, losses = unroll.run(unroll.meta_parameters(), unroll.start(generator, 2), unroll.batches(generator, 3, 2))
        assert losses.isfinite().all() and (losses[0] < task.loss_limit).all(), task.name
