import math

import pytest
import torch

from gmn_optim.errors import InvalidArgumentError, UnknownNameError
from gmn_optim.metatrain import Unroll, evaluate
from gmn_optim.metatrain.family_evaluation import Protocol, compare, evaluate_family, step_reduction, sweep_nominal
from gmn_optim.rule import RuleConfig, UpdateRule
from gmn_optim.tasks import tasks
from tests.metatrain.families import RULE, build_rule

PROTOCOL = Protocol(seeds=(1, 2), every=5)


def meta_of(config):
    return {name: value.detach() for name, value in build_rule(config, seed=0).named_parameters()}


def test_the_nominal_term_at_a_multiplier_is_a_rule_with_that_step_size():
    curves = sweep_nominal("quadratic", RuleConfig(alpha=0.01, width=4), PROTOCOL, (1.0, 3.0))
    unroll = Unroll(tasks["quadratic"](), UpdateRule(RuleConfig(body=None, alpha=0.03)))
    by_hand = evaluate(unroll, unroll.meta_parameters(), (1, 2), every=5).held_out.mean(1)
    torch.testing.assert_close(torch.tensor(curves[3.0]), by_hand)
    assert curves[1.0] != curves[3.0]


def test_a_rule_before_meta_training_equals_its_nominal_term():
    found = evaluate_family(["quadratic"], RULE, meta_of(RULE), PROTOCOL, multipliers=(1.0,))
    assert found.factor == pytest.approx(1.0) and found.worst_ratio == pytest.approx(1.0)


def test_the_reference_is_the_best_multiplier():
    found = evaluate_family(["quadratic"], RULE, meta_of(RULE), PROTOCOL, multipliers=(1.0, 30.0))
    assert found.factor < 1 and found.worst_ratio > 1


@pytest.mark.parametrize(
    ("curve", "reference", "expected"),
    [
        ([4.0, 1.0, 1.0], [4.0, 2.0, 1.0], 2.0),
        ([4.0, 3.0, 2.0], [4.0, 2.0, 1.0], 0.5),
        ([4.0, math.inf, math.nan], [4.0, 2.0, 1.0], 1.0),
        ([4.0, 5.0, 6.0], [5.0, 4.0, 3.0], 1.0),
        ([4.0, 2.0, 1.0], [4.0, math.inf, math.inf], 1.0),
    ],
)
def test_step_reduction_compares_steps_to_what_both_reach(curve, reference, expected):
    assert step_reduction(curve, reference, every=10) == expected


def test_the_summary_is_a_geometric_mean_and_the_worst_ratio():
    curves = {"a": [4.0, 1.0, 0.5], "b": [4.0, 3.0, 2.0]}
    nominal = {name: {1.0: [4.0, 2.0, 1.0]} for name in curves}
    found = compare(curves, nominal, every=10)
    assert found.factors == {"a": 2.0, "b": 0.5} and found.factor == pytest.approx(1.0)
    assert found.ratios == {"a": 0.5, "b": 2.0} and found.worst_ratio == 2.0


def test_a_training_that_diverges_has_an_infinite_ratio():
    found = compare({"a": [4.0, math.inf]}, {"a": {1.0: [4.0, 2.0]}}, every=10)
    assert found.worst_ratio == math.inf


def test_the_horizon_is_the_tasks_or_less_in_whole_measurements():
    assert [Protocol((1,), horizon, 5).steps_of(20) for horizon in (None, 12, 100)] == [20, 10, 20]
    with pytest.raises(InvalidArgumentError, match="every = 50 .* at most the 20 steps"):
        Protocol((1,)).steps_of(20)


def test_an_unknown_task_is_named():
    with pytest.raises(UnknownNameError, match="Did you mean 'quadratic'"):
        evaluate_family(["quadratics"], RULE, meta_of(RULE), PROTOCOL)
