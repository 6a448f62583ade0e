"""Averaged steps in the eigenbasis, against sequences that are written out."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy
import pytest
import torch
from torch import Tensor

from gmn_optim.gradients import DecomposedGradient
from gmn_optim.rule import Layout, RefreshClock, RuleConfig, Segment, UpdateRule, build_chunks, look_schedule, matrices
from gmn_optim.rule.kronecker import KroneckerAdamTerm
from gmn_optim.rule.scalars import Decay
from gmn_optim.rule.schedule_free import KroneckerScheduleFreeTerm
from tests import reference

STEPS, ALPHA = 12, 0.05
DUE = (1, 2, 3, 4, 8, 12)
CLOSE = {"rtol": 1e-6, "atol": 1e-7}  # exponents are stored in float32


@pytest.fixture(autouse=True)
def _early_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let bases be made anew at the steps of ``DUE``."""
    for name in ("FIRST_LOOKS", "FIRST_BASES"):
        monkeypatch.setattr(look_schedule, name, (1, 2, 3, 4))


def make_rule(largest: float = 0.0) -> UpdateRule:
    """Return the nominal term alone, with a bound of elements."""
    rule = UpdateRule(RuleConfig(nominal="kronecker_schedule_free", body=None, alpha=ALPHA))
    rule.nominal = KroneckerScheduleFreeTerm(refresh_every=4, follow_every=1)
    rule.nominal.largest_element = largest
    return rule.double().requires_grad_(False)


def draw(count: int, *shape: int, seed: int = 0) -> list[Tensor]:
    """Return random tensors in float64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).double() for _ in range(count)]


def layers(*widths: int) -> Layout:
    """Return the layout of linear layers."""
    segments = []
    for number, (inputs, outputs) in enumerate(pairwise(widths)):
        segments.append(Segment(f"{number}.weight", (outputs, inputs), str(number), "weight"))
        segments.append(Segment(f"{number}.bias", (outputs,), str(number), "bias"))
    return Layout(tuple(build_chunks(segments, False)))


def train(
    layout: Layout,
    start: dict[str, Tensor],
    gradients: Sequence[dict[str, Tensor]],
    factors: Sequence[dict[str, DecomposedGradient]],
    momentum: float | None = None,
    largest: float = 0.0,
) -> list[dict[str, Tensor]]:
    """Return the parameters after every step."""
    rule, current, passed = make_rule(largest), tuple(chunk.flatten(start) for chunk in layout.chunks), []
    state = rule.init_state(layout, current[0])
    momenta = () if momentum is None else [torch.tensor(momentum).double()] * len(layout.chunks)
    for named, given in zip(gradients, factors, strict=True):
        flat = tuple(chunk.flatten(named) for chunk in layout.chunks)
        updates, state = rule(current, flat, state, layout, momenta=momenta, factors=given)
        current = tuple(p - update.step for p, update in zip(current, updates, strict=True))
        passed.append({k: v for c, p in zip(layout.chunks, current, strict=True) for k, v in c.unflatten(p).items()})
    return passed


def joined(named: dict[str, Tensor], layer: str) -> numpy.ndarray:
    """Return a layer's weight with its bias as the last column."""
    return torch.cat([named[f"{layer}.weight"], named[f"{layer}.bias"][:, None]], 1).numpy()


@pytest.mark.parametrize(("size", "momentum"), [(1.0, None), (0.3, 0.6), (0.0, None), (1e-3, None), (0.01, 0.0)])
@pytest.mark.parametrize("widths", [(3, 4), (20, 3, 5, 2)])
@pytest.mark.parametrize("largest", [0.0, 0.8])
def test_matrices_take_the_steps_of_three_sequences(
    widths: tuple[int, ...], size: float, momentum: float | None, largest: float
) -> None:
    layout, count = layers(*widths), len(widths) - 1
    sides = {str(number): pair for number, pair in enumerate(pairwise(widths))}
    start = {s.name: size * draw(1, *s.shape, seed=len(s.name))[0] for chunk in layout.chunks for s in chunk.segments}
    start["0.weight"] *= 100 if size == 0.01 and count > 1 else 1
    drawn = {name: (draw(STEPS, 30, 1, i, seed=1), draw(STEPS, 30, 1, o, seed=2)) for name, (i, o) in sides.items()}
    factors = [{name: DecomposedGradient(a[k], g[k]) for name, (a, g) in drawn.items()} for k in range(STEPS)]
    gradients = [
        {f"{n}.weight": f.sum_of_outer_products() for n, f in each.items()}
        | {f"{n}.bias": f.sum_of_backprops() for n, f in each.items()}
        for each in factors
    ]
    passed = train(layout, start, gradients, factors, momentum, largest)
    small = reference.most_are_small([start[f"{name}.weight"].numpy() for name in sides])
    assert small is (size == 0.01 and count > 1)
    for name, (inputs, _) in sides.items():
        scale, turning, sharpness = min(1.0, math.sqrt(64 / inputs)) / 12, (False, False), 4.0
        if not small:
            scale, turning = reference.schedule_free_scale(start[f"{name}.weight"].numpy(), inputs, count), (True, True)
            sharpness = 10.0
        slow = reference.KroneckerScheduleFree(joined(start, name), turning, DUE, scale, sharpness, largest=largest)
        for gradient, given, found in zip(gradients, factors, passed, strict=True):
            a, g = ([*factor.flatten(0, 1).numpy()] for factor in given[name])
            columns = [numpy.append(row, 1.0) for row in a]
            wanted = slow.move(joined(gradient, name), (g, columns), ALPHA, 0.8 if momentum is None else momentum)
            torch.testing.assert_close(torch.from_numpy(joined(found, name)), torch.from_numpy(wanted), **CLOSE)


@pytest.mark.parametrize("rows", [6, 20])
def test_a_table_counts_as_having_one_input(rows: int) -> None:
    layout = Layout(tuple(build_chunks([Segment("table", (rows, 3), "table", "table")], False)))
    start, tokens = {"table": 0.2 * draw(1, rows, 3)[0]}, torch.arange(6).view(6, 1, 1)
    backprops = draw(STEPS, 6, 1, 3, seed=3)
    factors = [{"table": DecomposedGradient(tokens, g)} for g in backprops]
    gradients = [{"table": torch.zeros(rows, 3).double().index_add(0, tokens.flatten(), g[:, 0])} for g in backprops]
    scale = reference.schedule_free_scale(start["table"].numpy(), 1, 1)
    slow = reference.KroneckerScheduleFree(start["table"].numpy(), (False, True), DUE, scale, factored=False)
    for gradient, g, found in zip(gradients, backprops, train(layout, start, gradients, factors), strict=True):
        wanted = slow.move(gradient["table"].numpy(), ([numpy.ones(rows)], [*g[:, 0].numpy()]), ALPHA)
        torch.testing.assert_close(found["table"], torch.from_numpy(wanted), **CLOSE)


def test_the_size_of_a_weight_is_that_before_the_first_step() -> None:
    layout, rule = layers(3, 4), make_rule()
    (start,) = draw(1, 16)
    state = rule.init_state(layout, start)
    for number, size in enumerate((0.3, 5.0, 7.0)):
        _, state = rule((size * start,), (start,), state, layout)
        wanted = reference.root_mean_square((0.3 * start[:12]).tolist())
        assert state.bases[0].size.item() == pytest.approx(wanted, rel=1e-12), number


def test_a_convolutions_inputs_are_those_of_its_whole_window() -> None:
    layout = Layout(tuple(build_chunks([Segment("w", (4, 8, 3, 3), None, "other")], False)))
    (weight, gradient), rule, short = draw(2, 4 * 72), make_rule(), math.sqrt(64 / 72) * math.sqrt(2)
    (update,), _ = rule((weight * 0,), (gradient,), rule.init_state(layout, weight), layout)
    plain = UpdateRule(RuleConfig(nominal="kronecker_adam", body=None, alpha=ALPHA)).double()
    plain.nominal = KroneckerAdamTerm(refresh_every=4).double()
    (wanted,), _ = plain((weight * 0,), (gradient,), plain.init_state(layout, weight), layout)
    torch.testing.assert_close(update.step, short * wanted.step, rtol=1e-5, atol=0)


def test_a_matrix_without_any_basis_takes_the_steps_of_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "LONGEST_SIDE", 31)
    layout = Layout(tuple(build_chunks([Segment("0.weight", (32, 256), "0", "weight")], False)))
    (weight,), (gradient,) = draw(1, 32 * 256, seed=1), draw(1, 32 * 256, seed=2)
    weight = weight / weight.square().mean().sqrt() / math.sqrt(3 * 256)
    (update,), state = make_rule()((weight,), (gradient,), make_rule().init_state(layout, weight), layout)
    assert not state.bases[0].rows.numel() and not state.bases[0].columns.numel()
    scale = (256 / 64) ** -0.5 * (1 / 2) ** -0.5
    slow = reference.KroneckerScheduleFree(weight.view(32, 256).numpy(), (False, False), (), scale)
    wanted = slow.y - slow.move(gradient.view(32, 256).numpy(), None, ALPHA)
    torch.testing.assert_close(update.step.view(32, 256), torch.from_numpy(wanted), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("number", "share"), [(1, 1.0), (11, 0.5), (1_991, 0.005), (100_000, 0.005)])
def test_the_average_forgets_a_two_hundredth_at_least(number: int, share: float) -> None:
    term, (average,), step = KroneckerScheduleFreeTerm().double(), draw(1, 3), torch.tensor(float(number)).double()
    _, (kept, _) = term.direction(torch.zeros(3).double(), (average, torch.ones(3).double()), step)
    torch.testing.assert_close(kept, (1 - share) * average, **CLOSE)


@pytest.mark.parametrize("term", ["kronecker_adam", "kronecker_schedule_free"])
def test_a_gradient_that_its_factors_miss_is_remembered_for_twenty_steps_and_averaged_more(term: str) -> None:
    gradients, (start,) = draw(STEPS, 12), draw(1, 12)
    seen = []
    for missed, beta2 in ((True, None), (False, 0.95), (False, None)):
        role = "weight" if missed else "other"  # whose second moments are not factored
        rule = UpdateRule(RuleConfig(nominal=term, body=None)).double().requires_grad_(False)
        if beta2 is not None:
            rule.nominal.beta2 = Decay(beta2).double()
            if term == "kronecker_schedule_free":
                rule.nominal.beta = Decay(0.98).double()
        layout = Layout(tuple(build_chunks([Segment("0.weight", (3, 4), "0", role, missed=missed)], False)))
        state, current = rule.init_state(layout, start), start
        for gradient in gradients:
            (update,), state = rule((current,), (gradient,), state, layout)
            current = current - update.step
        seen.append(current)
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-6, atol=1e-7)
    assert (seen[0] - seen[2]).abs().max() > 1e-4


def test_wide_layers_of_a_network_with_small_weights_take_smaller_steps() -> None:
    layout = layers(3, 256, 4, 4)
    start = {s.name: draw(1, *s.shape)[0] for chunk in layout.chunks for s in chunk.segments}
    for number, size in enumerate((1.0, 0.08, 0.08)):
        start[f"{number}.weight"] *= size / math.sqrt(3 * start[f"{number}.weight"].shape[1])
    gradients = [{name: draw(1, *value.shape, seed=1)[0] for name, value in start.items()}]
    (moved,) = train(layout, start, gradients, [{}])
    for number, scale in enumerate((1.0, 0.5, 1.0)):
        slow = reference.KroneckerScheduleFree(joined(start, str(number)), (False, False), (), scale / 12, 4.0)
        wanted = torch.from_numpy(slow.move(joined(gradients[0], str(number)), None, ALPHA))
        torch.testing.assert_close(torch.from_numpy(joined(moved, str(number))), wanted, rtol=1e-5, atol=1e-7)


def test_between_two_looks_preconditioners_hold() -> None:
    rule, layout, looks = make_rule(), layers(3, 4), {1: 1, 2: 1, 3: 1, 4: 1, 6: 2, 8: 2, 9: 1, 12: 3}
    rule.nominal.follow_every = 3
    (start,) = draw(1, 16)
    state, current = rule.init_state(layout, start), (start,)
    clock = RefreshClock(rule.nominal, state)
    named = layout.chunks[0].unflatten(start)
    slow = reference.KroneckerScheduleFree(joined(named, "0"), (True, True), DUE, math.sqrt(2), looks=looks)
    slow.scale = reference.schedule_free_scale(named["0.weight"].numpy(), 3, 1)
    for number, (a, g) in enumerate(zip(draw(STEPS, 30, 1, 3, seed=1), draw(STEPS, 30, 1, 4, seed=2), strict=True), 1):
        given = DecomposedGradient(a, g)
        flat = layout.chunks[0].flatten({"0.weight": given.sum_of_outer_products(), "0.bias": given.sum_of_backprops()})
        assert clock.follows is (number in looks)
        options = {"refresh": clock.is_due, "follow": clock.follows, "factors": {"0": given} if clock.follows else None}
        (update,), state = rule(current, (flat,), state, layout, **options)
        current = (current[0] - update.step,)
        clock.advance()
        columns = [numpy.append(row, 1.0) for row in a.flatten(0, 1).numpy()]
        decay = 0.95 if number in looks else 1.0
        gradient = joined(layout.chunks[0].unflatten(flat), "0")
        wanted = torch.from_numpy(slow.move(gradient, ([*g.flatten(0, 1).numpy()], columns), ALPHA, decay=decay))
        found = torch.from_numpy(joined(layout.chunks[0].unflatten(current[0]), "0"))
        torch.testing.assert_close(found, wanted, **CLOSE)


def test_a_gradient_that_outgrows_what_it_is_divided_by_takes_a_bounded_step() -> None:
    rule, layout = make_rule(), layers(3, 4)
    (start,) = draw(1, 16)
    (_,), state = rule((start,), (start,), rule.init_state(layout, start), layout)
    (ordinary,), _ = rule((start,), (1.01 * start,), state, layout, refresh=False, follow=False)
    (large,), _ = rule((start,), (1e6 * start,), state, layout, refresh=False, follow=False)
    (larger,), _ = rule((start,), (1e9 * start,), state, layout, refresh=False, follow=False)
    torch.testing.assert_close(larger.step, large.step, rtol=1e-5, atol=1e-7)
    assert 1.0 < (large.step.norm() / ordinary.step.norm()).item() < 2.5


def test_there_is_no_step_before_the_first_look() -> None:
    rule, layout = make_rule(), layers(3, 4)
    (start,) = draw(1, 16)
    (update,), _ = rule((start,), (start,), rule.init_state(layout, start), layout, refresh=False, follow=False)
    assert not update.step.any()


def test_second_moments_are_followed_where_the_factors_of_a_look_are_not_known() -> None:
    rule, layout = make_rule(), layers(3, 4)
    (start,) = draw(1, 16)
    slow = reference.KroneckerScheduleFree(joined(layout.chunks[0].unflatten(start), "0"), (False, False), (), 1.0)
    slow.scale = reference.schedule_free_scale(layout.chunks[0].unflatten(start)["0.weight"].numpy(), 3, 1)
    state, current = rule.init_state(layout, start), (start,)
    for gradient in draw(3, 16, seed=1):
        (update,), state = rule(current, (gradient,), state, layout, refresh=True, follow=True, sees=False)
        current = (current[0] - update.step,)
        wanted = torch.from_numpy(slow.move(joined(layout.chunks[0].unflatten(gradient), "0"), None, ALPHA))
        found = torch.from_numpy(joined(layout.chunks[0].unflatten(current[0]), "0"))
        torch.testing.assert_close(found, wanted, **CLOSE)
    assert torch.equal(state.bases[0].rows[0], torch.eye(4).double()) and not state.bases[0].row_moment.any()


def test_steps_are_bounded_where_their_squares_overflow() -> None:
    rule, layout = make_rule().float(), layers(3, 4)
    (start,) = draw(1, 16)
    start = start.float()
    (_,), state = rule((start,), (0 * start,), rule.init_state(layout, start), layout)
    (update,), _ = rule((start,), (1e6 * start,), state, layout, refresh=False, follow=False)
    assert update.step.isfinite().all() and update.step.abs().max() > 1e-3
