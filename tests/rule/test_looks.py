"""Looks at the factors: when they are taken, and that what was seen holds until the next one."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from gmn_optim.gradients import DecomposedGradient
from gmn_optim.rule import Layout, RefreshClock, RuleConfig, RuleState, Segment, UpdateRule, build_chunks
from gmn_optim.rule.kronecker import KroneckerAdamTerm
from tests import reference
from tests.cases import make_rule, without_learned_term

WIDTHS = 4, 5
"""Inputs and outputs; the bias is a fifth column."""


def lay_out(learned: bool) -> Layout:
    """Return the layout of a linear layer."""
    inputs, outputs = WIDTHS
    weight, bias = Segment("0.weight", (outputs, inputs), "0", "weight"), Segment("0.bias", (outputs,), "0", "bias")
    return Layout(tuple(build_chunks([weight, bias], learned)))


def draw(steps: int) -> list[DecomposedGradient]:
    """Return factors of every step."""
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(steps, 7, 1, n, generator=generator).double() for n in WIDTHS]
    return [DecomposedGradient(*pair) for pair in zip(*sides, strict=True)]


def gradient_of(each: DecomposedGradient, layout: Layout) -> tuple[Tensor, ...]:
    """Return the flat gradient of each chunk."""
    named = {"0.weight": each.sum_of_outer_products(), "0.bias": each.sum_of_backprops()}
    return tuple(chunk.flatten(named) for chunk in layout.chunks)


def run(rule: UpdateRule, layout: Layout, factors: Sequence[DecomposedGradient]) -> tuple[list[Tensor], RuleState]:
    """Return every flat step and the last state; factors are there only where the clock says so."""
    state, taken = rule.init_state(layout, torch.zeros(()).double()), []
    clock = RefreshClock(rule.nominal, state)
    for each in factors:
        flat = gradient_of(each, layout)
        options = {"refresh": clock.is_due, "follow": clock.follows}
        (update,), state = rule(flat, flat, state, layout, factors={"0": each} if clock.follows else None, **options)
        clock.advance()
        taken.append(update.step)
    return taken, state


@pytest.mark.parametrize(
    ("every", "wanted"),
    [
        (2, [*range(1, 11), 12, 13, 14, 16, 18, 20, 22, 24, 25, 26]),
        (7, [*range(1, 11), 13, 14, 16, 20, 21, 25, 28]),
        (10, [*range(1, 11), 13, 16, 20, 25, 30, 35, 40, 45, *range(50, 141, 10)]),
        (80, [*range(1, 11), 13, 16, 20, 25, 30, 35, 40, 45, 50, 70, 80, 100, 150, 160]),
    ],
)
def test_factors_are_read_at_the_first_steps_at_every_so_many_and_where_bases_are_due(every, wanted) -> None:
    rule = UpdateRule(RuleConfig(nominal="kronecker_adam", body=None))
    rule.nominal = KroneckerAdamTerm(follow_every=every)
    clock, found = RefreshClock(rule.nominal, rule.init_state(lay_out(False))), []
    for step in range(1, wanted[-1] + 1):
        assert clock.follows or not clock.is_due
        found += [step] if clock.follows else []
        clock.advance()
    assert found == wanted


@pytest.mark.parametrize(
    ("refresh_every", "follow_every"), [(50, 10), (50, 5), (50, 7), (4, 3), (50, 70), (30, 1_000), (7, 1)]
)
def test_a_look_stands_for_the_steps_since_the_look_before(refresh_every: int, follow_every: int) -> None:
    term, last = KroneckerAdamTerm(refresh_every=refresh_every, follow_every=follow_every), 0
    for age in range(1, 400):
        if term.follows(age):
            assert term.gap(torch.tensor(float(age))).item() == term.gap(age) == age - last, age
            last = age


def test_the_host_and_the_device_answer_alike() -> None:
    term, ages = KroneckerAdamTerm(refresh_every=30, follow_every=7), range(0, 130)
    of_device = term.looks([torch.tensor(float(age)) for age in ages])
    assert [tuple(value.item() for value in each) for each in of_device] == [term.looks([0], n + 1)[0] for n in ages]


def test_rules_without_bases_and_those_with_gradmetanet_look_at_every_step() -> None:
    for rule in (UpdateRule(RuleConfig(nominal="adam")), make_rule("eigenbasis+gmn")):
        clock = RefreshClock(rule.nominal, rule.init_state(lay_out(True)))
        for _ in range(30):
            assert clock.follows
            clock.advance()


def test_between_two_looks_bases_hold_and_second_moments_go_on() -> None:
    rule = UpdateRule(RuleConfig(nominal="kronecker_adam", body=None, alpha=1.0)).double().requires_grad_(False)
    factors, layout = draw(19), lay_out(False)
    slow = reference.KroneckerAdam((5, 5), (True, True), (1, 2, 4, 7, 10))
    for number, (each, step) in enumerate(zip(factors, run(rule, layout, factors)[0], strict=True), 1):
        vectors = [[*side.flatten(0, 1).numpy()] for side in (each.backprops, each.activations)]
        vectors[1] = [torch.cat([torch.as_tensor(row), torch.ones(1)]).numpy() for row in vectors[1]]
        gradient = torch.cat([each.sum_of_outer_products(), each.sum_of_backprops()[:, None]], 1).numpy()
        decay = 0.95 if number <= 10 or number in (13, 16) else 1.0
        wanted = torch.from_numpy(slow.direction(gradient, tuple(vectors), decay=decay))
        torch.testing.assert_close(step, torch.cat([wanted[:, :-1].flatten(), wanted[:, -1]]), rtol=1e-8, atol=1e-9)


def test_a_look_at_the_noise_stands_for_the_steps_since_the_last_one() -> None:
    rule, layout, factors = make_rule("eigenbasis").double(), lay_out(True), draw(15)
    rule.nominal.refresh_every = 10**6  # after the tenth step bases stay, so that noise is seen in one basis
    _, state = run(rule, layout, factors)
    rows, columns = (side[0] for side in (state.bases[0].rows, state.bases[0].columns))
    noise = state.chunks[0].nominal[2]
    *_, before = (s.chunks[0].nominal[2] for s in [run(rule, layout, factors[:10])[1]])
    each = factors[12]
    pairs = zip(each.backprops.flatten(0, 1), each.activations.flatten(0, 1), strict=True)
    seen = reference.turned_noise([torch.outer(g, torch.cat([a, a.new_ones(1)])) for g, a in pairs], rows, columns)
    seen = torch.cat([seen[:, :-1].flatten(), seen[:, -1]])
    weights = [rule.nominal.beta2().item() ** (13 - step) for step in range(1, 14)]
    wanted = (sum(weights[:10]) * before + sum(weights[10:]) * seen) / sum(weights)
    torch.testing.assert_close(noise, wanted, rtol=1e-6, atol=1e-9)


def test_gains_hold_between_two_looks() -> None:
    rule, layout, factors = make_rule("eigenbasis").double(), lay_out(True), draw(12)
    _, state = run(rule, layout, factors[:11])
    gain = state.chunks[0].nominal[3]
    assert gain.abs().min() > 0
    flat = gradient_of(factors[11], layout)
    (update,), after = rule(flat, flat, state, layout, refresh=False, follow=False)
    assert torch.equal(after.chunks[0].nominal[3], gain)
    none = state._replace(chunks=tuple(c._replace(nominal=(*c.nominal[:3], gain * 0)) for c in state.chunks))
    (same,), _ = rule(flat, flat, none, layout, refresh=False, follow=False)
    plain = without_learned_term(rule).double()
    (nominal,), _ = plain(flat, flat, none, layout, refresh=False, follow=False)
    torch.testing.assert_close(same.step, nominal.step)
    assert (update.step - nominal.step).abs().max() > 1e-6
