import math

import pytest
import torch

from gmn_optim.errors import InvalidArgumentError, UnknownNameError
from gmn_optim.metatrain import Unroll, evaluate
from gmn_optim.metatrain.family_evaluation import TUNED_ADAM_LRS, Protocol, evaluate_family, sweep_adam, sweep_nominal
from gmn_optim.metatrain.family_figures import References, compare, speed, step_reduction
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
    assert found.against_nominal == pytest.approx(1.0) and found.worst_ratio == pytest.approx(1.0)


def test_the_reference_is_the_best_multiplier():
    found = evaluate_family(["quadratic"], RULE, meta_of(RULE), PROTOCOL, multipliers=(1.0, 30.0))
    assert found.against_nominal < 1 and found.worst_ratio > 1


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


def test_a_curve_that_takes_two_steps_at_once_is_twice_as_fast():
    reference = [8.0 * 0.9**step for step in range(41)]
    assert speed(reference[::2], reference, every=10) == pytest.approx(2.0, rel=1e-3)
    assert speed(reference, reference[::2], every=10) == pytest.approx(0.5, rel=1e-3)


def test_speed_counts_as_far_as_both_get():
    reference = [8.0 * 0.9**step for step in range(41)]
    assert speed(reference[:21], reference, every=10) == pytest.approx(1.0)


def test_the_last_level_is_reached_by_the_curve_that_ends_there():
    start, end = 2.0200601805416247, 0.31974333662388943
    assert start * (end / start) ** 1.0 < end  # rounded
    assert 0.9 < speed([start, 1.0, end], [start, 1.0, end - 0.1], every=10) < 1.0


def test_a_lucky_point_changes_speed_less_than_the_step_reduction():
    smooth = [8.0, 4.0, 2.0, 1.5, 1.3, 1.2, 1.1, 1.0]
    lucky = [8.0, 4.0, 2.0, 1.0, 1.3, 1.2, 1.1, 1.1]
    assert step_reduction(lucky, smooth, 10) > 2.3 and 1.0 < speed(lucky, smooth, 10) < 1.5


@pytest.mark.parametrize("bad", [[4.0, 4.0, 4.0], [4.0, 2.0, 0.0], [math.inf, 3.0, 2.0], [4.0, math.inf, math.inf]])
def test_where_there_is_no_way_down_on_a_logarithmic_scale_speed_is_the_step_reduction(bad):
    assert speed(bad, bad, 10) == step_reduction(bad, bad, 10) == 1.0


ADAM = {0.001: [4.0, 3.0, 2.0], 0.01: [4.0, 4.0, 1.0]}


def test_the_summary_is_geometric_means_and_the_worst_ratio():
    curves = {"a": [4.0, 1.0, 0.5], "b": [4.0, 3.0, 2.0]}
    references = {name: References({1.0: [4.0, 2.0, 1.0]}, ADAM) for name in curves}
    found = compare(curves, references, every=10)
    assert [found.tasks[name].against_nominal for name in "ab"] == [2.0, 0.5]
    assert [found.tasks[name].ratio for name in "ab"] == [0.5, 2.0] and found.worst_ratio == 2.0
    assert found.against_nominal == pytest.approx(1.0)


def test_both_untuned_is_against_the_nominal_terms_own_step_size():
    nominal = {1.0: [4.0, 4.0, 3.0], 3.0: [4.0, 2.0, 1.0]}
    found = compare({"a": [4.0, 3.0, 1.0]}, {"a": References(nominal, ADAM)}, every=10)
    assert (found.against_nominal, found.untuned) == (1.0, 2.0) and found.tasks["a"].multiplier == 3.0


def test_adam_counts_at_the_step_size_of_its_lowest_loss():
    found = compare({"a": [4.0, 1.0, 1.0]}, {"a": References({1.0: [4.0, 1.0, 1.0]}, ADAM)}, every=10)
    assert (found.against_nominal, found.against_adam, found.tasks["a"].adam_lr) == (1.0, 2.0, 0.01)


def test_adams_curves_are_those_of_the_nominal_term_adam():
    curves = sweep_adam("quadratic", PROTOCOL)
    assert tuple(curves) == TUNED_ADAM_LRS
    unroll = Unroll(tasks["quadratic"](), UpdateRule(RuleConfig(nominal="adam", body=None, alpha=0.004)))
    by_hand = evaluate(unroll, unroll.meta_parameters(), (1, 2), every=5).held_out.mean(1)
    torch.testing.assert_close(torch.tensor(curves[0.004]), by_hand)


def test_a_training_that_diverges_has_an_infinite_ratio_which_json_lacks():
    found = compare({"a": [4.0, math.inf]}, {"a": References({1.0: [4.0, 2.0]}, ADAM)}, every=10)
    assert found.worst_ratio == math.inf
    assert found.to_dict()["worst_ratio"] is None and found.to_dict()["tasks"]["a"]["ratio"] is None


@pytest.mark.parametrize(("curves", "nominal"), [({}, {}), ({"a": [4.0]}, {3.0: [4.0]})])
def test_nothing_to_compare_with_is_refused(curves, nominal):
    with pytest.raises(InvalidArgumentError, match="no task|lack 1"):
        compare(curves, {"a": References(nominal, ADAM)}, every=10)


def test_the_horizon_is_the_tasks_or_less_in_whole_measurements():
    assert [Protocol((1,), horizon, 5).steps_of(20) for horizon in (None, 12, 100)] == [20, 10, 20]
    with pytest.raises(InvalidArgumentError, match="every = 50 .* at most the 20 steps"):
        Protocol((1,)).steps_of(20)


def test_an_unknown_task_is_named():
    with pytest.raises(UnknownNameError, match="Did you mean 'quadratic'"):
        evaluate_family(["quadratics"], RULE, meta_of(RULE), PROTOCOL)
