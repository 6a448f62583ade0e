import pytest
import torch
from torch.func import functional_call
from torch.utils._pytree import tree_map

from gmn_optim.errors import InvalidArgumentError
from gmn_optim.metatrain import FamilyConfig, MetaShape
from gmn_optim.metatrain.slots import Slot, SlotProgress, draw_perturbations
from gmn_optim.metatrain.standardization import log_meta_loss, slot_gradient, standardize
from gmn_optim.rule import RuleConfig, UpdateRule
from gmn_optim.tasks import AbstractTaskFamily
from gmn_optim.tasks.quadratic import QuadraticTask

HORIZON, TRUNCATION = 20, 5


class OneQuadratic(AbstractTaskFamily):
    def sample(self, generator):
        return QuadraticTask(noise=0.0, horizon=HORIZON, dtype=torch.float64)


def quadratic_rule():
    return UpdateRule(RuleConfig(nominal="momentum", body=None, alpha=0.05)).double()


def exact_gradients(rule):
    """Slow and obvious: one training by hand, autograd through all of it, for the loss of every truncation."""
    slot = Slot(OneQuadratic(), rule, FamilyConfig(), number=0, draw=0)
    meta = {name: value.detach().clone().requires_grad_() for name, value in rule.named_parameters()}
    x, state = torch.ones(2, dtype=torch.float64), tree_map(lambda leaf: leaf[0], slot.state.rule)
    losses = []
    for _ in range(HORIZON):
        losses.append((0.5 * (slot.task.curvatures * x.square()).sum() + slot.task.loss_floor).log())
        arguments = ((x,), (slot.task.curvatures * x,), state, slot.unroll.layout)
        (update,), state = functional_call(rule, meta, arguments)
        x = x - update.step
    means = torch.stack(losses).unflatten(0, (-1, TRUNCATION)).mean(1)
    return torch.stack(
        [
            torch.stack(torch.autograd.grad(mean, list(meta.values()), retain_graph=True, materialize_grads=True))
            for mean in means
        ]
    )


def estimates(rule, replicate, standardized):
    """Return the estimates of every truncation of one slot, and the root mean squares of its differences."""
    config = FamilyConfig(unrolls=256, truncation=TRUNCATION, sigma=1e-3, slots=200, seed=5, held_out_every=0)
    slot, progress = Slot(OneQuadratic(), rule, config, replicate, draw=0), SlotProgress(0, 0, HORIZON)
    meta = {name: value.detach() for name, value in rule.named_parameters()}
    shape = MetaShape(meta)
    flat = shape.flatten(meta)
    total, found, spreads = torch.zeros(config.pairs, len(flat), dtype=flat.dtype), [], []
    with torch.no_grad():
        for step in range(HORIZON // TRUNCATION):
            noise = draw_perturbations(config, replicate, step, torch.ones_like(flat))
            losses = slot.advance(shape, flat, noise, progress._replace(age=step * TRUNCATION))
            total += noise
            facts = {"truncations": step + 1, "sigma": config.sigma, "standardized": standardized}
            found.append(slot_gradient(*losses, total, **facts))
            spreads.append((losses[0] - losses[1]).square().mean().sqrt())
    return torch.stack(found), torch.stack(spreads)


def test_the_plain_estimate_is_unbiased_for_every_truncation():
    rule = quadratic_rule()
    runs = [estimates(rule, replicate, standardized=False) for replicate in range(40)]
    samples, truth = torch.stack([plain for plain, _ in runs]), exact_gradients(rule)
    errors = samples.std(0) / len(samples) ** 0.5
    assert truth.abs().max() > 0.1
    assert ((samples.mean(0) - truth).abs() <= 4 * errors + 1e-6 * truth.abs()).all()


def test_the_standardized_estimate_is_the_plain_one_times_the_documented_weight():
    rule = quadratic_rule()
    (plain, spreads), (standardized, _) = (estimates(rule, 0, flag) for flag in (False, True))
    counts = torch.arange(1, 5, dtype=torch.float64)
    weights = 2 * 1e-3 / (counts.sqrt() * spreads)
    torch.testing.assert_close(standardized, weights[:, None] * plain)


def test_standardized_estimates_are_the_same_whatever_the_scale_of_the_losses():
    generator = torch.Generator().manual_seed(0)
    positive, negative = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    perturbations = 0.01 * torch.randn(8, 3, generator=generator, dtype=torch.float64)
    facts = {"truncations": 1, "sigma": 0.01, "standardized": True}
    first = slot_gradient(positive, negative, perturbations, **facts)
    scaled = slot_gradient(1e-6 * positive, 1e-6 * negative, perturbations, **facts)
    torch.testing.assert_close(first, scaled)
    assert 0.01 < first.abs().mean() < 2


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_standardized_differences_have_a_root_mean_square_of_one(scale):
    assert standardize(scale * torch.tensor([1.0, -2.0, 0.5])).square().mean().item() == pytest.approx(1.0)


def test_differences_of_zero_stay_zero():
    assert standardize(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


def test_losses_that_are_not_finite_count_as_the_limit():
    task = QuadraticTask()
    task.loss_limit, task.loss_floor = 9.0, 1.0
    losses = torch.tensor([[torch.nan, torch.inf, 1e9, 1.0, -1.0]], dtype=torch.float64)
    found = log_meta_loss(losses, task, age=0, end=1)
    torch.testing.assert_close(found.exp(), torch.tensor([10.0, 10.0, 10.0, 2.0, 1.0], dtype=torch.float64))


def test_emphasis_weighs_late_losses():
    task = QuadraticTask()
    early, late = (log_meta_loss(torch.full((5, 1), 2.0), task, age, 10, emphasis=2.0) for age in (0, 5))
    assert late > 5 * early


def test_a_floor_keeps_differences_of_rounding_size_small_and_leaves_others() -> None:
    perturbations = torch.tensor([[0.1], [-0.1]])
    options = {"truncations": 1, "sigma": 0.1, "standardized": True}
    for size, share in ((1e-6, 1e-6 / 3e-3), (0.5, 1.0)):
        losses = torch.tensor([size, -size]), torch.zeros(2)
        whole, floored = (slot_gradient(*losses, perturbations, floor=floor, **options) for floor in (0.0, 3e-3))
        torch.testing.assert_close(floored, share * whole)


@pytest.mark.parametrize("floor", [-1.0, float("inf"), float("nan")])
def test_a_floor_that_makes_no_sense_is_refused(floor: float) -> None:
    with pytest.raises(InvalidArgumentError, match="difference_floor"):
        FamilyConfig(difference_floor=floor)
