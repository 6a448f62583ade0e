"""The bytes that an optimizer says it holds are those that a reader can work out by hand."""

import copy

import pytest
import torch
from torch import nn

from gmn_optim import GMNOptimizer
from gmn_optim.memory_usage import MemoryUsage, count_bytes
from tests.cases import ARMS, WITH_FACTORS, loss_of, make_rule, mlp, optimizer_for, train

# The model of the tests is 5-7-6-3: its neurons, what its layers read and write for a data point, its parameters.
NEURONS, READ_AND_WRITTEN, PARAMETERS = 5 + 7 + 6 + 3, 5 + 7 + 6 + 7 + 6 + 3, 42 + 48 + 21
ROWS, DECAYS, DATA_POINTS, FLOAT = 6, 6, 8, 4

# Of each layer both sides have a moment and a basis, inputs with a 1 for the bias, and some terms a preconditioner.
# There are the bases' age and the weight's size besides.
SIDES = 7**2 + 6**2 + 3**2 + 6**2 + 8**2 + 7**2
BASES = 2 * SIDES + 2 * 3

# Numbers that each arm remembers: buffers of the nominal term, averages, memory of the factors, and numbers of steps;
# what averages weigh where steps are averaged.
STATES = {
    "momentum": PARAMETERS + 1,
    "adam": 2 * PARAMETERS + 1,
    "kronecker_adam": 2 * PARAMETERS + 1 + BASES,
    "kronecker_schedule_free": 2 * PARAMETERS + 2 + BASES + SIDES,
    "momentum+ds": (1 + DECAYS) * PARAMETERS + 1,
    "slots": (1 + DECAYS) * PARAMETERS + ROWS * NEURONS * 2 * DECAYS + 2,
    "moments": (2 + DECAYS) * PARAMETERS + NEURONS * 4 * DECAYS + 2,
    "gated": (2 + DECAYS) * PARAMETERS + NEURONS * 4 * DECAYS + 2,
    "kronecker_adam+gmn": (2 + DECAYS) * PARAMETERS + ROWS * NEURONS * 2 * DECAYS + 2 + BASES,
    "scheduled": (2 + DECAYS) * PARAMETERS + ROWS * NEURONS * 2 * DECAYS + 2,
    "eigenbasis": 4 * PARAMETERS + 2 + BASES + SIDES,
    "eigenbasis+gmn": 4 * PARAMETERS + 2 + BASES + SIDES,
    "controller": 2 * PARAMETERS + 2 + BASES + SIDES + (5 + 64) * 3,
}


def backward(model: nn.Module, data_points: int = DATA_POINTS) -> None:
    """Leave gradients, and factors where they are captured."""
    loss_of(model, torch.randn(data_points, 5, dtype=model[0].weight.dtype)).backward()


def test_before_the_first_step_only_the_rule_takes_memory(make_model, arm) -> None:
    usage = optimizer_for(make_model(), arm).memory_usage()
    assert (usage.factors, usage.state) == (0, 0)
    assert usage.meta_model == sum(FLOAT * value.numel() for value in make_rule(arm).state_dict().values()) > 0


def test_the_state_is_counted_once_however_many_views_there_are(make_model, batches, arm) -> None:
    model = make_model()
    optimizer = optimizer_for(model, arm)
    for batch in batches[:3]:
        train(model, optimizer, [batch])
        assert optimizer.memory_usage().state == FLOAT * STATES[arm]
    assert STATES.keys() == ARMS.keys()


def test_a_model_in_float64_takes_twice_the_memory(make_model, doubles, arm) -> None:
    model = make_model(torch.float64)
    optimizer = optimizer_for(model, arm)
    train(model, optimizer, doubles[:1])
    assert optimizer.memory_usage().state == 2 * FLOAT * STATES[arm]


def test_factors_are_counted_from_the_backward_pass_to_the_step(make_model, arm) -> None:
    model = make_model()
    optimizer = optimizer_for(model, arm)
    held = FLOAT * DATA_POINTS * READ_AND_WRITTEN if make_rule(arm).reads_factors else 0
    for release in (optimizer.step, optimizer.zero_grad, optimizer.close):
        optimizer.zero_grad()
        backward(model)
        assert optimizer.memory_usage().factors == held
        release()
        assert optimizer.memory_usage().factors == 0


@pytest.mark.parametrize("arm", WITH_FACTORS)
def test_accumulated_passes_add_up_and_a_limit_on_rows_holds(make_model, arm) -> None:
    model, limited = make_model(), make_model()
    optimizer, frugal = optimizer_for(model, arm), optimizer_for(limited, arm, rows=4)
    for each in (model, limited):
        backward(each)
        backward(each, data_points=3)
    assert optimizer.memory_usage().factors == FLOAT * (DATA_POINTS + 3) * READ_AND_WRITTEN
    assert frugal.memory_usage().factors == FLOAT * (4 + 3) * READ_AND_WRITTEN


def test_a_batch_that_is_a_view_counts_as_all_that_it_keeps_alive(make_model, batches) -> None:
    model, inputs = make_model(), torch.randn(100, 5)
    optimizer = optimizer_for(model, "slots")
    loss_of(model, inputs[:DATA_POINTS]).backward()
    beside = FLOAT * DATA_POINTS * (READ_AND_WRITTEN - 5)
    assert optimizer.memory_usage().factors == beside + FLOAT * inputs.numel()


def test_a_copy_holds_as_much_as_the_original(make_model, batches, arm) -> None:
    model = make_model()
    optimizer = optimizer_for(model, arm)
    train(model, optimizer, batches[:2])
    other, copied = copy.deepcopy((model, optimizer))
    train(other, copied, batches[2:3])
    assert copied.memory_usage() == optimizer.memory_usage()


def test_entries_of_a_users_own_in_the_state_are_counted_if_they_are_tensors(make_model) -> None:
    optimizer = optimizer_for(make_model(), "adam")
    optimizer.state["note"], optimizer.state["seen"] = "no tensor", [torch.zeros(3), 7, None]
    assert optimizer.memory_usage().state == 3 * FLOAT


def test_the_total_is_the_sum_and_the_table_names_every_kind() -> None:
    usage = MemoryUsage(factors=1_000, state=20_000, meta_model=300)
    assert usage.total == 21_300
    header, rule, *rows = str(usage).splitlines()
    assert header == "memory     | bytes" and set(rule) == set("-| ")
    assert [row.split(" | ")[0].strip() for row in rows] == ["factors", "state", "meta model", "total"]
    assert rows[-1] == "total      | 21,300"


def test_tensors_without_elements_take_no_memory() -> None:
    assert count_bytes([torch.empty(0, 3), torch.empty(0), nn.Parameter(torch.empty(2, 0))]) == 0


def test_an_optimizer_without_a_learned_term_holds_what_adam_holds(batches) -> None:
    model, twin = mlp(), mlp()
    optimizer, adam = GMNOptimizer(model, weights=None, nominal="adam"), torch.optim.Adam(twin.parameters())
    train(model, optimizer, batches[:1])
    train(twin, adam, batches[:1])
    steps = len(adam.state) - 1  # of Adam each parameter has a number of steps, of ours each chunk
    assert optimizer.memory_usage().state == count_bytes(adam.state) - FLOAT * steps
