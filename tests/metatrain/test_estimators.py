import pytest
import torch
from torch.func import functional_call

from gmn_optim.errors import InvalidArgumentError, UnknownNameError
from gmn_optim.metatrain import Horizons, MetaShape, Unroll, estimators
from gmn_optim.metatrain.backpropagation import TruncatedBackpropagation
from gmn_optim.rule import RuleConfig, UpdateRule
from gmn_optim.tasks import tasks
from gmn_optim.tasks.quadratic import QuadraticTask
from tests.cases import LEARNED, make_rule
from tests.tables import ESTIMATORS

HORIZON, TRUNCATION = 20, 5


def quadratic_unroll():
    task = QuadraticTask(size=2, condition=10.0, noise=0.0, horizon=HORIZON, dtype=torch.float64)
    return Unroll(task, UpdateRule(RuleConfig(nominal="momentum", body=None, alpha=0.05)).double())


def exact_meta_gradient(unroll, steps=HORIZON, truncation=None):
    """Slow and obvious: one training by hand, autograd through all of it (or from each truncation's start alone)."""
    meta = {name: value.clone().requires_grad_() for name, value in unroll.meta_parameters().items()}
    x, state = torch.ones(2, dtype=torch.float64), unroll.start(torch.Generator(), 1)
    rule_state = torch.utils._pytree.tree_map(lambda leaf: leaf[0], state.rule)
    losses = []
    for step in range(steps):
        if truncation and step % truncation == 0:
            x, rule_state = torch.utils._pytree.tree_map(lambda leaf: leaf.detach(), (x, rule_state))
        losses.append(0.5 * (unroll.task.curvatures * x.square()).sum())
        gradient = unroll.task.curvatures * x
        (update,), rule_state = functional_call(unroll.rule, meta, ((x,), (gradient,), rule_state, unroll.layout))
        x = x - update.step
    gradients = torch.autograd.grad(torch.stack(losses).mean(), list(meta.values()))
    return torch.stack(gradients)


def estimates_over_a_horizon(name, replicates, truncation=TRUNCATION, **settings):
    unroll = quadratic_unroll()
    shape = MetaShape(unroll.meta_parameters())
    meta = shape.flatten(unroll.meta_parameters())
    horizons = Horizons(HORIZON, HORIZON, staggered=False)
    estimator = estimators[name](unroll, shape, horizons=horizons, truncation=truncation, **settings)
    generator = torch.Generator().manual_seed(7)
    results = []
    for _ in range(replicates):
        state, parts = estimator.init(generator), []
        for _ in range(HORIZON // truncation):
            estimate, state = estimator.estimate(meta, state, generator)
            parts.append(estimate.gradient)
        results.append(torch.stack(parts).mean(0))
    return torch.stack(results)


def is_around(samples, truth, errors):
    """Whether the mean of the samples is within so many standard errors of the truth, or of rounding."""
    bound = errors * samples.std(0) / len(samples) ** 0.5 + 1e-9 * truth.abs()
    return bool(((samples.mean(0) - truth).abs() <= bound).all())


@pytest.fixture(name="samples")
def fixture_samples(name):
    return estimates_over_a_horizon(name, ESTIMATORS[name].replicates, **ESTIMATORS[name].settings)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_is_unbiased_for_what_it_sees(name, samples):
    truncation = None if ESTIMATORS[name].sees_whole_horizon else TRUNCATION
    assert is_around(samples, exact_meta_gradient(quadratic_unroll(), truncation=truncation), errors=4)


@pytest.mark.parametrize("name", [name for name, case in ESTIMATORS.items() if not case.sees_whole_horizon])
def test_an_estimator_that_sees_one_truncation_is_biased_for_the_whole(name, samples):
    assert not is_around(samples, exact_meta_gradient(quadratic_unroll()), errors=8)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimate_is_finite_repeats_itself_and_leaves_meta_parameters_alone(name):
    unroll = quadratic_unroll()
    shape = MetaShape(unroll.meta_parameters())
    meta = shape.flatten(unroll.meta_parameters())
    estimator = estimators[name](unroll, shape, unrolls=4, truncation=5, horizons=Horizons(10, 20))
    before, estimates = meta.clone(), []
    for _ in range(2):
        generator = torch.Generator().manual_seed(3)
        estimates.append(estimator.estimate(meta, estimator.init(generator), generator)[0])
    assert torch.equal(meta, before) and not estimates[0].gradient.requires_grad
    assert estimates[0].gradient.shape == meta.shape and estimates[0].gradient.isfinite().all()
    assert torch.equal(estimates[0].gradient, estimates[1].gradient) and torch.equal(*(e.loss for e in estimates))


def test_backpropagation_through_a_whole_horizon_is_exact():
    samples = estimates_over_a_horizon("backprop", replicates=1, truncation=HORIZON, unrolls=2)
    torch.testing.assert_close(samples[0], exact_meta_gradient(quadratic_unroll()))


def test_emphasis_weighs_late_losses_and_keeps_the_mean_weight():
    unroll = quadratic_unroll()
    estimator = estimators["pes"](
        unroll, MetaShape(unroll.meta_parameters()), horizons=Horizons(100, 100), truncation=50, emphasis=2.0
    )
    losses = torch.ones(50, 1, dtype=torch.float64)
    early = estimator.meta_loss(losses, torch.tensor([0]), torch.tensor([100]))
    late = estimator.meta_loss(losses, torch.tensor([50]), torch.tensor([100]))
    assert late > 5 * early
    torch.testing.assert_close((early + late) / 2, torch.ones(1, dtype=torch.float64), rtol=1e-3, atol=0)


def test_losses_that_are_not_finite_or_huge_count_as_the_limit():
    unroll = quadratic_unroll()
    estimator = estimators["pes"](unroll, MetaShape(unroll.meta_parameters()), horizons=Horizons(20, 20))
    losses = torch.tensor([[torch.nan, torch.inf, 1e9, 2.0]], dtype=torch.float64)
    ages, ends = torch.zeros(4), torch.full((4,), 20)
    limit = unroll.task.loss_limit
    assert estimator.meta_loss(losses, ages, ends).tolist() == [limit, limit, limit, 2.0]


def test_an_odd_number_of_unrolls_has_no_pairs():
    unroll = quadratic_unroll()
    with pytest.raises(InvalidArgumentError, match="even number of unrolls, got 3"):
        estimators["pes"](unroll, MetaShape(unroll.meta_parameters()), unrolls=3, horizons=Horizons(20, 20))


def test_an_unknown_estimator_is_named_with_near_matches():
    with pytest.raises(UnknownNameError, match="Did you mean 'pes'"):
        estimators["pess"]


def test_both_sides_of_a_pair_start_alike_and_a_finished_pair_starts_anew():
    unroll = quadratic_unroll()
    shape = MetaShape(unroll.meta_parameters())
    meta = shape.flatten(unroll.meta_parameters())
    estimator = estimators["pes"](unroll, shape, unrolls=4, truncation=5, horizons=Horizons(10, 10, staggered=False))
    generator = torch.Generator().manual_seed(0)
    state = estimator.init(generator)
    for half in (state.unrolls.parameters[0][:2], state.unrolls.parameters[0][2:]):
        assert (half == 1.0).all()
    for _ in range(3):
        _, state = estimator.estimate(meta, state, generator)
    assert state.ages.tolist() == [5, 5]
    assert state.unrolls.rule.step.tolist() == [5, 5, 5, 5]
    assert state.perturbations.abs().max() < 5 * estimator.sigma


@pytest.mark.parametrize(("shortest", "longest"), [(100, 100), (50, 800)])
def test_horizons_are_whole_truncations_within_their_range(shortest, longest):
    drawn = Horizons(shortest, longest).sample(torch.Generator().manual_seed(0), 200, 50)
    assert (drawn % 50 == 0).all() and drawn.min() >= shortest and drawn.max() <= longest
    assert (drawn.unique().numel() > 5) == (longest > shortest)


def test_staggered_first_horizons_end_at_different_times():
    first = Horizons(800, 800).first(torch.Generator().manual_seed(0), 8, 50)
    assert first.tolist() == [100, 200, 300, 400, 500, 600, 700, 800]


@pytest.mark.parametrize("arm", LEARNED)
def test_backpropagation_through_neurons_without_factors_is_finite(arm):
    """Input neurons have no backprops and dead ones no gradient: roots of zero, whose slope is infinite."""
    unroll = Unroll(tasks["fashion-mnist-mlp"](), make_rule(arm))
    shape = MetaShape(unroll.meta_parameters())
    estimator = TruncatedBackpropagation(unroll, shape, unrolls=2, truncation=3, horizons=Horizons(6, 6))
    generator = torch.Generator().manual_seed(0)
    estimate, _ = estimator.estimate(shape.flatten(unroll.meta_parameters()), estimator.init(generator), generator)
    assert estimate.gradient.isfinite().all() and estimate.gradient.any()
