"""Adam in an eigenbasis: against slow loops, against plain Adam, and where bases are hard to find."""

from collections.abc import Sequence
from dataclasses import replace

import numpy
import pytest
import torch
from torch import Tensor

from gmn_optim.gradients import DecomposedGradient
from gmn_optim.rule import Layout, RefreshClock, RuleConfig, RuleState, Segment, UpdateRule, build_chunks, look_schedule
from gmn_optim.rule import matrices as matrices_module
from gmn_optim.rule.basis import Basis, eigenbases, init_basis, renew
from gmn_optim.rule.kronecker import KroneckerAdamTerm
from tests import reference

STEPS = 12
DUE = (1, 2, 3, 4, 8, 12)
"""With four first steps and every fourth after them."""

CLOSE = {"rtol": 1e-8, "atol": 1e-9}

WEIGHT, BIAS = Segment("0.weight", (4, 3), "0", "weight"), Segment("0.bias", (4,), "0", "bias")
TABLE = Segment("table", (6, 3), "table", "table")


@pytest.fixture(autouse=True)
def _early_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let bases be made anew at the steps of ``DUE``."""
    for name in ("FIRST_LOOKS", "FIRST_BASES"):
        monkeypatch.setattr(look_schedule, name, (1, 2, 3, 4))


def make_rule(dtype: torch.dtype = torch.float64, method: str = "eigh", **config: object) -> UpdateRule:
    """Return the nominal term alone with step size 1."""
    rule = UpdateRule(RuleConfig(nominal="kronecker_adam", body=None, alpha=1.0, **config))
    rule.nominal = KroneckerAdamTerm(refresh_every=4, method=method, follow_every=1)
    return rule.to(dtype).requires_grad_(False)


def lay_out(*segments: Segment) -> Layout:
    """Return the layout of a chunk."""
    return Layout(tuple(build_chunks(segments, False)))


def draw(rows: int, inputs: int, outputs: int, dtype: torch.dtype = torch.float64) -> list[DecomposedGradient]:
    """Return factors of every step, correlated among neurons."""
    generator = torch.Generator().manual_seed(0)
    mix_a, mix_g = (torch.randn(n, n, generator=generator) for n in (inputs, outputs))
    return [
        DecomposedGradient(
            (torch.randn(rows, 2, inputs, generator=generator) @ mix_a).to(dtype),
            (torch.randn(rows, 2, outputs, generator=generator) @ mix_g).to(dtype),
        )
        for _ in range(STEPS)
    ]


def run(
    rule: UpdateRule, layout: Layout, gradients: Sequence[dict[str, Tensor]], factors: Sequence[dict] | None = None
) -> list[dict[str, Tensor]]:
    """Return every step by name, bases being made anew by the clock."""
    state = rule.init_state(layout, next(iter(gradients[0].values())))
    clock = RefreshClock(rule.nominal, state)
    taken = []
    for number, named in enumerate(gradients):
        flat = tuple(chunk.flatten(named) for chunk in layout.chunks)
        options = {"factors": None if factors is None else factors[number], "refresh": clock.is_due}
        updates, state = rule(flat, flat, state, layout, **options)
        clock.advance()
        steps: dict[str, Tensor] = {}
        for chunk, update in zip(layout.chunks, updates, strict=True):
            steps.update(chunk.unflatten(update.step))
        taken.append(steps)
    return taken


def recompose(each: DecomposedGradient) -> dict[str, Tensor]:
    """Return the gradients of a linear layer."""
    return {"0.weight": each.sum_of_outer_products(), "0.bias": each.sum_of_backprops()}


def vectors(factor: Tensor, bias: bool = False) -> list[numpy.ndarray]:
    """Return the rows of a factor (b, p, n), with a 1 behind where asked for."""
    return [numpy.append(row, 1.0) if bias else row for row in factor.flatten(0, 1).numpy()]


# ---------------------------------------------------------------------- the slow reference


@pytest.mark.parametrize("rows", [1, 5], ids=["rank-deficient", "full rank"])
def test_with_factors_weight_and_bias_take_the_steps_of_slow_loops(rows: int) -> None:
    factors = draw(rows, 3, 4)
    found = run(make_rule(), lay_out(WEIGHT, BIAS), list(map(recompose, factors)), [{"0": each} for each in factors])
    slow = reference.KroneckerAdam((4, 4), (True, True), DUE)
    for each, step in zip(factors, found, strict=True):
        gradient = torch.cat([each.sum_of_outer_products(), each.sum_of_backprops()[:, None]], 1).numpy()
        wanted = slow.direction(gradient, (vectors(each.backprops), vectors(each.activations, True)))
        joined = torch.cat([step["0.weight"], step["0.bias"][:, None]], 1)
        torch.testing.assert_close(joined, torch.from_numpy(wanted), **CLOSE)


def test_without_factors_the_basis_comes_from_the_gradient() -> None:
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(4, 3, generator=generator).double() for _ in range(STEPS)]
    found = run(make_rule(), lay_out(Segment("w", (4, 3))), [{"w": each} for each in gradients])
    slow = reference.KroneckerAdam((4, 3), (True, True), DUE)
    for each, step in zip(gradients, found, strict=True):
        torch.testing.assert_close(step["w"], torch.from_numpy(slow.direction(each.numpy())), **CLOSE)


@pytest.mark.parametrize(("shape", "sides"), [((4, 3), (False, True)), ((3, 4), (True, False))])
def test_a_side_beyond_the_limit_keeps_its_axes(monkeypatch, shape, sides) -> None:
    monkeypatch.setattr(matrices_module, "LONGEST_SIDE", 3)
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(shape, generator=generator).double() for _ in range(STEPS)]
    found = run(make_rule(), lay_out(Segment("w", shape)), [{"w": each} for each in gradients])
    slow = reference.KroneckerAdam(shape, sides, DUE)
    for each, step in zip(gradients, found, strict=True):
        torch.testing.assert_close(step["w"], torch.from_numpy(slow.direction(each.numpy())), **CLOSE)


def test_a_table_has_a_basis_of_its_width_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    backprops = [torch.randn(5, 1, 3, generator=generator).double() for _ in range(STEPS)]
    rows = [torch.randint(6, (5, 1, 1), generator=generator) for _ in range(STEPS)]
    gradients = [
        torch.zeros(6, 3).double().index_add(0, row.flatten(), g.flatten(0, 1))
        for row, g in zip(rows, backprops, strict=True)
    ]
    factors = [{"table": DecomposedGradient(*pair)} for pair in zip(rows, backprops, strict=True)]
    found = run(make_rule(), lay_out(TABLE), [{"table": each} for each in gradients], factors)
    slow = reference.KroneckerAdam((6, 3), (False, True), DUE)
    for gradient, g, step in zip(gradients, backprops, found, strict=True):
        wanted = slow.direction(gradient.numpy(), ([numpy.ones(6)], vectors(g)))
        torch.testing.assert_close(step["table"], torch.from_numpy(wanted), **CLOSE)


def test_blocks_of_groups_are_matrices_of_their_own() -> None:
    factors = draw(5, 4, 6)
    weight, bias = Segment("0.weight", (6, 2), "0", "weight", groups=2), Segment("0.bias", (6,), "0", "bias")
    gradients = [
        {"0.weight": each.sum_of_outer_products(groups=2), "0.bias": each.sum_of_backprops()} for each in factors
    ]
    found = run(make_rule(), lay_out(weight, bias), gradients, [{"0": each} for each in factors])
    for block in range(2):
        outs, ins = slice(3 * block, 3 * block + 3), slice(2 * block, 2 * block + 2)
        own = [DecomposedGradient(a[..., ins], g[..., outs]) for a, g in factors]
        segments = replace(WEIGHT, shape=(3, 2)), replace(BIAS, shape=(3,))
        alone = run(make_rule(), lay_out(*segments), list(map(recompose, own)), [{"0": each} for each in own])
        for step, mine in zip(found, alone, strict=True):
            # the size that damping is measured by is the whole layer's
            torch.testing.assert_close(step["0.weight"][outs], mine["0.weight"], rtol=1e-3, atol=1e-3)


def test_with_bases_that_never_turn_it_is_adam() -> None:
    rule, adam = make_rule(), UpdateRule(RuleConfig(nominal="adam", body=None, alpha=1.0)).double()
    rule.nominal.damping.initial = 0.0
    layout = lay_out(WEIGHT, BIAS)
    state, plain = rule.init_state(layout, torch.zeros(()).double()), adam.init_state(layout, torch.zeros(()).double())
    for each in draw(5, 3, 4):
        flat = tuple(chunk.flatten(recompose(each)) for chunk in layout.chunks)
        updates, state = rule(flat, flat, state, layout, factors={"0": each}, refresh=False)
        wanted, plain = adam(flat, flat, plain, layout)
        torch.testing.assert_close(updates[0].step, wanted[0].step, rtol=1e-12, atol=1e-14)


def test_a_bias_of_another_clock_is_plain_adam() -> None:
    factors, adam = draw(5, 3, 4), UpdateRule(RuleConfig(nominal="adam", body=None, alpha=1.0)).double()
    layout = Layout((*build_chunks([WEIGHT], False), *build_chunks([BIAS], False, clock=1)))
    gradients = list(map(recompose, factors))
    found = run(make_rule(), layout, gradients, [{"0": each} for each in factors])
    wanted = run(adam, lay_out(BIAS), gradients)
    for step, plain in zip(found, wanted, strict=True):
        torch.testing.assert_close(step["0.bias"], plain["0.bias"], rtol=1e-12, atol=0)


def test_weight_and_bias_may_stand_in_different_chunks() -> None:
    factors = draw(5, 3, 4)
    gradients, given = list(map(recompose, factors)), [{"0": each} for each in factors]
    apart = Layout((*build_chunks([WEIGHT], False), *build_chunks([BIAS], False)))
    for one, other in zip(
        run(make_rule(), apart, gradients, given),
        run(make_rule(), lay_out(WEIGHT, BIAS), gradients, given),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


# ---------------------------------------------------------------------- invariances


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_factors_is_immaterial_also_in_float32(scale: float) -> None:
    factors = draw(5, 3, 4, torch.float32)
    layout, gradients = lay_out(WEIGHT, BIAS), list(map(recompose, factors))
    wanted = run(make_rule(torch.float32), layout, gradients, [{"0": each} for each in factors])
    scaled = [{"0": DecomposedGradient(a, g * scale)} for a, g in factors]
    for one, other in zip(wanted, run(make_rule(torch.float32), layout, gradients, scaled), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_the_step_turns_with_the_coordinates_of_inputs_and_outputs() -> None:
    factors = draw(5, 3, 4)
    turn_a, turn_g = (torch.linalg.qr(torch.randn(n, n).double())[0] for n in (3, 4))
    turned = [DecomposedGradient(a @ turn_a.mT, g @ turn_g.mT) for a, g in factors]
    layout = lay_out(WEIGHT, BIAS)
    steps, others = (
        run(make_rule(), layout, list(map(recompose, each)), [{"0": one} for one in each]) for each in (factors, turned)
    )
    for step, other in zip(steps, others, strict=True):
        torch.testing.assert_close(turn_g @ step["0.weight"] @ turn_a.mT, other["0.weight"], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(turn_g @ step["0.bias"], other["0.bias"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", [*eigenbases])
def test_directions_that_no_data_point_shows_stay_as_they_are(method: str) -> None:
    factors = draw(2, 8, 6, torch.float32)
    blind = torch.ones(8)
    blind[[1, 4]] = 0.0
    factors = [DecomposedGradient(a * blind, g) for a, g in factors]
    layout = lay_out(replace(WEIGHT, shape=(6, 8)), replace(BIAS, shape=(6,)))
    for step in run(
        make_rule(torch.float32, method), layout, list(map(recompose, factors)), [{"0": each} for each in factors]
    ):
        assert step["0.weight"].isfinite().all() and step["0.weight"][:, [0, 2]].abs().max() > 1e-2
        # rounding errors there are not blown up to full steps, as Adam in another basis than the axes would
        assert step["0.weight"][:, [1, 4]].abs().max() < 0.1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_factors_of_no_use_leave_the_bases_orthonormal(value: float) -> None:
    factors = draw(5, 3, 4)
    factors[5] = DecomposedGradient(torch.full_like(factors[5][0], value), torch.full_like(factors[5][1], value))
    given = [{"0": each} for each in factors]
    gradients = [recompose(each) for each in draw(5, 3, 4)]
    found = run(make_rule(), lay_out(WEIGHT, BIAS), gradients, given)
    assert all(step["0.weight"].isfinite().all() for step in found)


def test_factors_of_another_shape_are_not_taken_for_the_matrix_own() -> None:
    gradients = list(map(recompose, draw(5, 3, 4)))
    strange = [{"0": each} for each in draw(5, 2, 4)]
    for one, other in zip(
        run(make_rule(), lay_out(WEIGHT, BIAS), gradients, strange),
        run(make_rule(), lay_out(WEIGHT, BIAS), gradients),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


# ---------------------------------------------------------------------- bases


def test_the_clock_tells_when_any_basis_is_due(monkeypatch) -> None:
    monkeypatch.setattr(look_schedule, "FIRST_BASES", (1, 2))
    rule = make_rule()
    state = rule.init_state(lay_out(WEIGHT))
    clock, due = RefreshClock(rule.nominal, state), []
    for step in range(1, 10):
        due += [step] if clock.is_due else []
        clock.advance()
    assert due == [1, 2, 4, 8]
    older = state._replace(bases=(state.bases[0]._replace(age=torch.tensor([3.0, 6.0])),))
    assert RefreshClock(rule.nominal, older).is_due
    assert not RefreshClock(make_rule().nominal, RuleState((), torch.zeros(0), torch.zeros(()))).is_due


def test_only_bases_that_are_due_are_made_anew() -> None:
    rule, layout = make_rule(), lay_out(WEIGHT, BIAS)
    state = rule.init_state(layout, torch.zeros(()).double())
    state = state._replace(bases=(state.bases[0]._replace(age=torch.tensor(4.0).double()),))
    (each, *_) = draw(5, 3, 4)
    flat = tuple(chunk.flatten(recompose(each)) for chunk in layout.chunks)
    one, asked = rule(flat, flat, state, layout, factors={"0": each}, refresh=True)
    other, unasked = rule(flat, flat, state, layout, factors={"0": each}, refresh=False)
    assert torch.equal(one[0].step, other[0].step)
    assert torch.equal(asked.bases[0].rows, unasked.bases[0].rows) and asked.bases[0].age == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthogonal_iteration_finds_the_eigenbasis(dtype: torch.dtype) -> None:
    directions = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).double())[0]
    moment = (directions * torch.tensor([9.0, 4.0, 1.0, 0.1, 0.0])) @ directions.mT
    basis, moment = torch.eye(5, dtype=dtype)[None], moment.to(dtype)[None]
    for _ in range(60):
        basis = eigenbases["qr"](moment, basis)
    diagonal = (basis.mT @ moment @ basis)[0]
    torch.testing.assert_close(
        diagonal.diag().double(), torch.tensor([9.0, 4.0, 1.0, 0.1, 0.0]).double(), rtol=1e-4, atol=1e-5
    )
    assert (diagonal - diagonal.diag().diag()).abs().max() < 1e-4
    torch.testing.assert_close(basis[0].mT @ basis[0], torch.eye(5, dtype=dtype))


def test_a_turned_second_moment_is_permuted_with_the_directions_and_keeps_its_sum() -> None:
    (matrix,) = lay_out(WEIGHT).matrices
    second = torch.arange(12.0).double().view(1, 4, 3)
    flipped = {4: torch.eye(4).double().flip(1)[None], 3: -torch.eye(3).double()[None]}

    def flip(moment: Tensor, basis: Tensor) -> Tensor:
        return flipped[basis.shape[-1]]

    start: Basis = init_basis(matrix, second)
    basis, turned = renew(start, second, torch.tensor(True), flip)
    assert torch.equal(turned, second.flip(1)) and torch.equal(basis.rows, flipped[4])
    generator = torch.Generator().manual_seed(0)
    moments = [torch.randn(1, n, n, generator=generator).double() for n in (4, 3)]
    correlated = start._replace(row_moment=moments[0] @ moments[0].mT, column_moment=moments[1] @ moments[1].mT)
    assert renew(correlated, second, torch.tensor(True), eigenbases["eigh"])[1].sum().item() == pytest.approx(66.0)
