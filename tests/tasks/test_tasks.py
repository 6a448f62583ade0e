"""What every task must pass: it maps over many copies, draws nothing at random itself, and can be trained."""

import pytest
import torch
from torch.func import grad, vmap
from torch.utils._pytree import tree_map

from gmn_optim.errors import DataError
from gmn_optim.metatrain import Unroll
from gmn_optim.rule import UpdateRule
from gmn_optim.tasks import AbstractTask, tasks
from gmn_optim.tasks.image_fit import ImageFitTask
from tests.tables import ARMS, TASKS, TaskCase

COPIES = 3


@pytest.fixture(name="task", params=list(TASKS))
def fixture_task(request: pytest.FixtureRequest) -> AbstractTask:
    """Return every task in turn, but for those whose data are not here."""
    try:
        return tasks[request.param]()
    except DataError as error:
        pytest.skip(str(error))


@pytest.fixture(name="case")
def fixture_case(request: pytest.FixtureRequest, task: AbstractTask) -> TaskCase:
    """Return the row of the task."""
    return TASKS[request.node.callspec.params["task"]]


def seeded(seed: int = 0) -> torch.Generator:
    """Return a source of randomness."""
    return torch.Generator().manual_seed(seed)


def shapes(tree: object) -> object:
    """Return the shapes of tensors."""
    return tree_map(lambda leaf: tuple(leaf.shape), tree)


def test_parameters_and_batches_have_the_promised_shapes(task: AbstractTask, case: TaskCase) -> None:
    assert shapes(task.init_parameters(seeded())) == dict(case.parameters)
    assert shapes(task.sample_batch(seeded())) == tuple(case.batch)
    assert shapes(task.sample_batch(seeded(), (4, 2))) == tuple((4, 2, *shape) for shape in case.batch)
    assert set(case.parameters) == {name for name, _ in task.module.named_parameters()}


def test_nothing_is_drawn_but_from_the_generator(task: AbstractTask) -> None:
    before = torch.get_rng_state()
    first, second = ((task.init_parameters(g), task.sample_batch(g, (2,))) for g in (seeded(), seeded()))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    task.loss(first[0], task.sample_batch(seeded()))
    assert torch.equal(torch.get_rng_state(), before)
    batches = [task.sample_batch(seeded(seed))[0] for seed in (0, 1)]
    assert not torch.equal(*batches)


def test_the_loss_is_pure_and_bounded_at_the_start(task: AbstractTask) -> None:
    parameters, batch = task.init_parameters(seeded()), task.sample_batch(seeded(1))
    given = tree_map(torch.clone, (parameters, batch))
    first, second = task.loss(parameters, batch), task.loss(parameters, batch)
    assert first.shape == () and torch.equal(first, second) and first < task.loss_limit and task.horizon > 0
    torch.testing.assert_close((parameters, batch), given, rtol=0, atol=0)


def test_losses_and_gradients_map_over_many_copies(task: AbstractTask) -> None:
    generator = seeded()
    each = [task.init_parameters(generator) for _ in range(COPIES)]
    batches = task.sample_batch(generator, (COPIES,))
    stacked = {name: torch.stack([one[name] for one in each]) for name in each[0]}
    losses, gradients = vmap(task.loss)(stacked, batches), vmap(grad(task.loss))(stacked, batches)
    for k, parameters in enumerate(each):
        batch = tuple(part[k] for part in batches)
        torch.testing.assert_close(losses[k], task.loss(parameters, batch))
        torch.testing.assert_close(tree_map(lambda g, k=k: g[k], gradients), grad(task.loss)(parameters, batch))
    assert all(gradient.any() for gradient in gradients.values())


def test_held_out_sets_stay_the_same_and_differ_from_each_other(task: AbstractTask) -> None:
    for split in ("validation", "test"):
        torch.testing.assert_close(task.held_out(split), task.held_out(split), rtol=0, atol=0)
    if isinstance(task, ImageFitTask):  # all its parts are the whole picture
        return
    validation, test = task.held_out("validation")[0], task.held_out("test")[0]
    assert validation.shape != test.shape or not torch.equal(validation, test)


def test_adam_lowers_the_held_out_loss(task: AbstractTask, case: TaskCase) -> None:
    generator, held_out = seeded(), task.held_out("validation")
    parameters = {name: value.requires_grad_() for name, value in task.init_parameters(generator).items()}
    optimizer = torch.optim.Adam(parameters.values(), case.lr)
    losses = []
    for _ in range(40):
        losses.append(task.loss(parameters, task.sample_batch(generator)))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert torch.stack(losses).isfinite().all()
    with torch.no_grad():
        assert task.loss(parameters, held_out) < 0.95 * task.loss(task.init_parameters(seeded()), held_out)


@pytest.mark.parametrize("arm", ["adam", "kronecker_adam", "slots", "moments"])
def test_rules_train_many_copies_side_by_side(task: AbstractTask, arm: str) -> None:
    unroll, generator = Unroll(task, UpdateRule(ARMS[arm])), seeded()
    state, batches = unroll.start(generator, COPIES), unroll.batches(generator, 5, COPIES)
    after, losses = unroll.run(unroll.meta_parameters(), state, batches)
    assert losses.shape == (5, COPIES) and losses.isfinite().all()
    assert all(not torch.equal(old, new) for old, new in zip(state.parameters, after.parameters, strict=True))
