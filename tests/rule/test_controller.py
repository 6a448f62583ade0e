"""The controller: what it remembers of a matrix, and when it speeds up or slows down."""

import math

import pytest
import torch
from torch import Tensor

from gmn_optim.rule.basis import init_basis
from gmn_optim.rule.controller import LEAST_PACE, RATE, Controller
from gmn_optim.rule.coordinates import Coordinates, TurnedRows
from gmn_optim.rule.eigenbasis_steps import EigenbasisSteps
from gmn_optim.rule.falling_bound import LEAST_BOUND, FallingBound
from gmn_optim.rule.layout import Layout, Segment, build_chunks
from gmn_optim.rule.look_schedule import Look
from tests import reference

LAYOUT = Layout(tuple(build_chunks([Segment("0.weight", (4, 3), "0", "weight")], True)))
(MATRIX,) = LAYOUT.matrices
MODEL = [MATRIX] * 2
ALPHA = torch.tensor(0.01, dtype=torch.float64)
REPETITION, FIRST_ROW = 4, 5
"""Where a memory tells how often rows are seen, and which they are."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Return a random tensor in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def make_body(**weights: float) -> Controller:
    """Return a body that writes a weighted sum of some of its features and nothing else."""
    body = Controller(4, None, 0).double().requires_grad_(False)
    places = {"pace": 0, "cosine": 1, "ratio": 2, "concentration": 3}
    for name, weight in weights.items():
        if name == "bias":
            body.linear.bias.fill_(weight)
        else:
            body.linear.weight[0, places[name]] = weight
    return body


def cut(values: Tensor) -> tuple[Tensor, ...]:
    """Return a matrix in two flat parts, as those of weight and bias are."""
    return values.flatten().split([8, 4])


def remembering(*numbers: float) -> Tensor:
    """Return a memory that begins with these numbers."""
    return torch.tensor(numbers + (0.0,) * (Controller.memory_per_matrix - len(numbers)), dtype=torch.float64)


def see(age: int, memory: Tensor, average: Tensor | None = None, gap: float = 1.0, scale: float = 1.0) -> Coordinates:
    """Return a matrix of seven rows at some age, its gradient along an average of earlier steps or as drawn."""
    rows = TurnedRows(draw(1, 7, 3, seed=age), scale * draw(1, 7, 4, seed=50 + age))
    gradient = rows.backprops.mT @ rows.activations
    basis = init_basis(MATRIX, gradient, memory=len(memory))._replace(
        age=torch.tensor(float(age)).double(), memory=memory
    )
    average = draw(1, 4, 3, seed=99) if average is None else average
    squares, floor = gradient.square(), torch.tensor(1e-4).double()
    look = Look(torch.tensor(gap > 0), torch.tensor(False), torch.tensor(gap).double())
    seen = gradient, gradient.sign(), squares, floor, None, rows, None, cut(gradient), cut(average), look
    return Coordinates(MATRIX, basis, *seen)


def look(body: Controller, each: Coordinates) -> tuple[Tensor, Tensor]:
    """Return gain and memory of one matrix."""
    ((gain, memory),) = body([each], [draw(1, 4, 3, seed=5)], MODEL, ALPHA)
    return gain, memory


def of_softmax(rows: TurnedRows) -> TurnedRows:
    """Return rows whose backprops are those of the cross-entropy of a softmax with labels."""
    probabilities = rows.backprops.softmax(-1)
    labels = torch.nn.functional.one_hot(rows.backprops.argmin(-1), probabilities.shape[-1])
    return rows._replace(backprops=(probabilities - labels) / probabilities.shape[1])


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("labels", [False, True])
def test_it_remembers_what_loops_find(on_host: bool, labels: bool) -> None:
    body, memory, seen = make_body(), remembering(), []
    for age in range(1, 15):
        # every fourth batch is the first one again, or a part of it
        each = see(age, memory, gap=1.0 if age <= 10 else 5.0)._replace(age=age if on_host else None)
        if age % 4 == 0:
            again = torch.cat([see(1, memory).rows.activations[:, : 8 - age // 4], each.rows.activations], dim=1)[:, :7]
            each = each._replace(rows=each.rows._replace(activations=again))
        if labels:
            each = each._replace(rows=of_softmax(each.rows))
        memory = look(body, each)[1] if age % 3 else body.hold([each], MODEL)[0].memory
        rows = list(zip(each.rows.backprops[0], each.rows.activations[0], strict=True)) if age % 3 else None
        seen.append((age, torch.cat(each.own_gradient), torch.cat(each.average), rows))
    assert memory[:FIRST_ROW].tolist() == pytest.approx([0.0, *reference.controller_memory(seen)])
    assert (memory[REPETITION] > 0) == labels


@pytest.mark.parametrize("gap", [1.0, 5.0, 0.0])
def test_a_look_changes_the_pace_by_its_steps_and_no_more(gap: float) -> None:
    gain, memory = look(make_body(bias=100.0), see(3, remembering(), gap=gap))
    assert memory[0].item() == pytest.approx(RATE * gap)
    assert gain.item() == pytest.approx(math.expm1(RATE * gap))


@pytest.mark.parametrize(("first", "pace"), [(0.0, 0.0), (0.02, 0.2), (-0.03, -0.3), (0.1, 0.8)])
@pytest.mark.parametrize("looks", [True, False])
def test_a_training_begins_at_the_learned_pace_up_to_the_largest(first: float, pace: float, looks: bool) -> None:
    body, each = make_body(), see(1, remembering())
    body.first_pace.fill_(first)
    gain, memory = look(body, each) if looks else body.hold([each], MODEL)[0]
    assert gain.item() == pytest.approx(math.expm1(pace))
    assert memory[0] == 0  # what is remembered is the change


def test_a_single_row_changes_no_more_than_the_cosine() -> None:
    body, memory = make_body(bias=1.0), remembering(0.3, 0.1, 0.2, 0.4)
    each = see(4, memory)
    rows = TurnedRows(*(side[:, :1] for side in each.rows))
    alone = look(body, each._replace(rows=rows, own_gradient=cut(rows.backprops.mT @ rows.activations)))[1]
    assert torch.equal(alone[[0, 2, 3, 4, 5]], memory[[0, 2, 3, 4, 5]]) and alone[1] != memory[1]


def test_gradients_along_the_steps_of_late_speed_up_and_those_against_them_slow_down() -> None:
    body, memory = make_body(cosine=1.0), remembering()
    gradient = see(4, memory).gradient
    assert look(body, see(4, memory, average=gradient))[0] > 0.05
    assert look(body, see(4, memory, average=-gradient))[0] < -0.05


def test_gradients_that_agree_are_told_from_noise() -> None:
    body, memory = make_body(ratio=1.0), remembering()
    each = see(1, memory)
    rows = TurnedRows(*(side[:, :1].expand_as(side) for side in each.rows))
    agreeing = each._replace(rows=rows, own_gradient=cut(rows.backprops.mT @ rows.activations))
    noisy = each._replace(own_gradient=cut(1e-3 * each.gradient))
    # seven equal gradients: the square of their sum is seven times the sum of their squares
    assert look(body, agreeing)[1][2].item() == pytest.approx(math.log(7))
    assert look(body, agreeing)[0] > 0 > look(body, noisy)[0]


@pytest.mark.parametrize("others", [0.0, 1e-3, 1.0])
def test_gradients_of_one_row_are_told_from_those_of_all(others: float) -> None:
    each = see(1, remembering())
    scales = torch.tensor([1.0, *[others] * 6], dtype=torch.float64)[None, :, None]
    rows = TurnedRows(torch.ones_like(each.rows.activations), scales.expand_as(each.rows.backprops))
    gain, memory = look(make_body(concentration=1.0), each._replace(rows=rows))
    share = (1 + 6 * others) ** 2 / (7 * (1 + 6 * others**2))
    assert memory[3].item() == pytest.approx(-math.log(share), abs=1e-12)
    assert (gain > 0) == (others < 1)


def test_without_any_gradient_nothing_is_known_of_its_rows() -> None:
    each = see(4, remembering(0.0, 0.0, 0.0, 0.75))
    rows = TurnedRows(each.rows.activations, torch.zeros_like(each.rows.backprops))
    memory = look(make_body(), each._replace(rows=rows, own_gradient=cut(torch.zeros_like(each.gradient))))[1]
    assert memory[3].item() == 0.75


def test_between_looks_the_pace_holds_and_the_cosine_goes_on() -> None:
    memory = remembering(0.5, 0.0, 0.25, 0.75)
    gain, after = make_body(bias=1.0).hold([see(7, memory)], MODEL)[0]
    assert gain.item() == pytest.approx(math.expm1(0.5))
    assert after[1] != 0 and after[[0, 2, 3]].tolist() == [0.5, 0.25, 0.75]


@pytest.mark.parametrize(("bias", "bound"), [(100.0, 0.4), (-100.0, LEAST_PACE)])
def test_the_pace_has_bounds(bias: float, bound: float) -> None:
    body, memory = make_body(bias=bias), remembering()
    body.set_up(0.0, FallingBound(largest_pace=0.4))
    for age in range(1, 60):
        memory = look(body, see(age, memory))[1]
    assert memory[0].item() == bound


@pytest.mark.parametrize(
    ("pace", "age", "wanted"), [(0.4, 80, 0.4 - math.log(1.2)), (-0.6, 30, -0.6), (0.4, 1_000_000, LEAST_BOUND)]
)
@pytest.mark.parametrize("on_host", [False, True])
def test_with_annealing_the_largest_pace_falls(pace: float, age: int, wanted: float, on_host: bool) -> None:
    body, memory = make_body(), remembering(pace, 0.0, 0.0, 0.0)
    body.set_up(0.0, FallingBound(largest_pace=0.4, annealing=50.0))
    each = see(age, memory, average=torch.zeros(1, 4, 3).double())._replace(age=age if on_host else None)
    ((looked, after),) = body([each], [draw(1, 4, 3)], [MATRIX] * 4, ALPHA)
    held = body.hold([each], [MATRIX] * 4)[0].gain
    assert looked.item() == pytest.approx(math.expm1(wanted)) == held.item()
    assert after[0].item() == pytest.approx(pace)


@pytest.mark.parametrize(
    ("concentrations", "fallen"),
    [((0.3, 2.0), 0.0), ((1.0, 0.75), 0.5), ((3.0, 2.0), 3.0), ((9.0, 9.0), 0.4 - LEAST_BOUND)],
)
def test_the_largest_pace_falls_where_few_rows_make_gradients_in_every_matrix(
    concentrations: tuple[float, float], fallen: float
) -> None:
    body = make_body()
    body.set_up(0.0, FallingBound(largest_pace=0.4, concentration=2.0))
    seen = [see(9, remembering(0.4, -0.1, 0.0, each)) for each in concentrations]
    for change in body.hold(seen, MODEL):
        assert math.log1p(change.gain.item()) == pytest.approx(max(0.4 - fallen, LEAST_BOUND))


def test_both_causes_add_up() -> None:
    body, each = make_body(), see(100, remembering(0.4, -0.1, 0.0, 0.75))
    body.set_up(0.0, FallingBound(largest_pace=0.4, annealing=100.0, concentration=2.0))
    gain = body.hold([each], MODEL)[0].gain
    assert math.log1p(gain.item()) == pytest.approx(0.4 - math.log(1 + 100 / (100 * 4)) - 2.0 * 0.25)


@pytest.mark.parametrize(("cosine", "share"), [(-0.5, 1.0), (0.05, 0.5), (0.2, 0.0)])
def test_the_largest_pace_falls_less_while_gradients_agree_with_the_steps(cosine: float, share: float) -> None:
    body, each = make_body(), see(100, remembering(0.4, cosine, 0.0, 0.0))
    body.set_up(0.0, FallingBound(largest_pace=0.4, annealing=50.0))
    across = cut(torch.zeros_like(each.gradient))  # a cosine of zero, of which the memory takes a fifth
    each = each._replace(average=across, basis=each.basis._replace(memory=each.basis.memory / 0.8))
    gain = body.hold([each], [MATRIX])[0].gain
    assert math.log1p(gain.item()) == pytest.approx(0.4 - share * math.log(2))


@pytest.mark.parametrize("follow", [True, False])
@pytest.mark.parametrize(
    ("role", "size", "changed"), [("weight", 1.0, True), ("weight", 0.1, False), ("table", 1.0, False)]
)
def test_annealing_leaves_alone_what_the_controller_does_not_serve(
    follow: bool, role: str, size: float, changed: bool
) -> None:
    layout = Layout(tuple(build_chunks([Segment("0.weight", (4, 3), "0", role)], True)))
    body, each = make_body(), see(1_000, remembering())
    body.set_up(0.0, FallingBound(largest_pace=0.4, annealing=10.0))
    rows = each.rows if follow and role == "weight" else None
    basis = each.basis._replace(size=torch.tensor(size / 3).double())  # torch's initialization has 1 / sqrt(3 inputs)
    each = each._replace(matrix=layout.matrices[0], rows=rows, basis=basis)
    parameters = [torch.ones(12).double()]
    steps = EigenbasisSteps(body, layout, parameters, ALPHA, limit=1.0, floor=0.1, least_size=0.25)
    assert (steps([each], follow)[0].factor == 1) != changed


def test_without_meta_training_the_nominal_step_stays() -> None:
    gain, memory = look(Controller(4, None, 0).double(), see(1, remembering()))
    assert gain.item() == 0 and memory[0].item() == 0


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_the_scale_of_the_loss_is_immaterial(scale: float) -> None:
    body = make_body(cosine=0.3, ratio=0.2, bias=0.1)
    found, wanted = (look(body, see(2, remembering(), scale=each)) for each in (scale, 1.0))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_factors_that_are_not_finite_are_forgotten(bad: float) -> None:
    body, memory = make_body(cosine=0.3, ratio=0.2), remembering()
    each = see(2, memory)
    rows = TurnedRows(each.rows.activations * bad, each.rows.backprops)
    gain, memory = look(body, each._replace(rows=rows, own_gradient=cut(each.gradient * bad)))
    assert memory.isfinite().all() and gain.isfinite()


def test_with_a_setpoint_it_holds_the_cosine_there() -> None:
    body = Controller(4, None, 0).double()
    body.set_up(0.02, FallingBound(largest_pace=0.8))
    memory = remembering(0.0, -0.02, 0.0, 0.0)
    each = see(9, memory, average=torch.zeros(1, 4, 3).double())
    ((_, above),) = body(
        [each._replace(basis=each.basis._replace(memory=memory + 0.05))], [draw(1, 4, 3)], MODEL, ALPHA
    )
    ((_, below),) = body(
        [each._replace(basis=each.basis._replace(memory=memory - 0.05))], [draw(1, 4, 3)], MODEL, ALPHA
    )
    assert above[0] > 0.05 and below[0] < -0.05
