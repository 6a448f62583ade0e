"""The body in the eigenbasis: what it reads, that signs and order of eigenvectors are immaterial, and its guard."""

import pytest
import torch
from torch import Tensor, nn

from gmn_optim.neuron_sets import choose_rows
from gmn_optim.nn import GradMetaNetConfig
from gmn_optim.rule.basis import init_basis
from gmn_optim.rule.coordinates import Coordinates, TurnedRows
from gmn_optim.rule.eigen_features import coordinate_features, layer_features
from gmn_optim.rule.eigen_neurons import gather_eigen_neurons
from gmn_optim.rule.eigenbasis_body import EigenbasisBody
from gmn_optim.rule.layout import Layout, Segment, build_chunks
from tests import reference

LAYOUT = Layout(tuple(build_chunks([Segment("0.weight", (4, 3), "0", "weight")], True)))
(MATRIX,) = LAYOUT.matrices


FLOOR = torch.tensor(1e-4, dtype=torch.float64)


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Return a random tensor in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def coordinates() -> Coordinates:
    """Return a matrix (4, 3) with seven rows."""
    rows = TurnedRows(draw(1, 7, 3, seed=1), draw(1, 7, 4, seed=2))
    gradient, average = rows.backprops.mT @ rows.activations, draw(1, 4, 3, seed=3)
    squares = draw(1, 4, 3, seed=4).square() + 0.1
    basis = init_basis(MATRIX, gradient)
    seen = gradient, gradient / squares.sqrt(), squares, FLOOR, rows.noise(), rows, torch.zeros_like(gradient)
    return Coordinates(MATRIX, basis, *seen, (gradient.flatten(),), (average.flatten(),))


def moved(each: Coordinates, rows: Tensor, columns: Tensor) -> Coordinates:
    """Return the same matrix with eigenvectors in another order or of another sign, given by matrices."""
    turned = TurnedRows(each.rows.activations @ columns, each.rows.backprops @ rows)
    signed = {name: rows.mT @ getattr(each, name) @ columns for name in ("gradient", "step")}
    plain = {name: rows.abs().mT @ getattr(each, name) @ columns.abs() for name in ("squares", "noise")}
    return each._replace(rows=turned, **signed, **plain)


def make_body(with_network: bool) -> EigenbasisBody:
    """Return a body whose weights are all random."""
    torch.manual_seed(0)
    body = EigenbasisBody(8, GradMetaNetConfig(width=8) if with_network else None, 5).double().requires_grad_(False)
    nn.init.normal_(body.output.weight, std=0.3)
    nn.init.normal_(body.output.bias, std=0.3)
    return body


def gains(body: EigenbasisBody, each: Coordinates) -> Tensor:
    """Return what a body makes of a matrix (1, 4, 3)."""
    (change,) = body([each], [draw(1, 4, 3, seed=5)], [MATRIX] * 2, torch.tensor(0.01).double())
    return change.gain


MOVES = {
    "signs": (torch.tensor([1.0, -1, -1, 1]).diag().double(), torch.tensor([-1.0, 1, -1]).diag().double()),
    "order": (torch.eye(4).double()[[2, 0, 3, 1]], torch.eye(3).double()[[1, 2, 0]]),
}


def test_noise_is_the_sum_of_squared_gradients_of_each_data_point_turned_by_itself() -> None:
    a, g = draw(7, 3, seed=1), draw(7, 4, seed=2)
    rows, columns = (torch.linalg.qr(draw(n, n))[0] for n in (4, 3))
    wanted = reference.turned_noise([torch.outer(*pair) for pair in zip(g, a, strict=True)], rows, columns)
    torch.testing.assert_close(TurnedRows((a @ columns)[None], (g @ rows)[None]).noise()[0], wanted)


def test_features_are_those_of_loops() -> None:
    each, parameters = coordinates(), draw(1, 4, 3, seed=5)
    wanted = reference.coordinate_features(each.gradient[0], each.squares[0], each.noise[0])
    torch.testing.assert_close(coordinate_features(each)[0], wanted)
    values = (
        each.squares[0],
        each.noise[0],
        *(part.view(4, 3) for part in (*each.own_gradient, *each.average)),
        parameters[0],
    )
    assert layer_features(each, parameters, 3)[0].tolist() == pytest.approx(reference.layer_features(*values, 3))


def test_eigen_neurons_have_the_features_of_loops() -> None:
    each = coordinates()
    neurons = gather_eigen_neurons([each.rows], 5)
    (chosen,) = choose_rows({"0": (each.rows.activations[0], each.rows.backprops[0])}, 5).values()
    start = 0
    for side in (each.rows.activations[0], each.rows.backprops[0]):
        sets, own = reference.eigen_neuron_features(side, chosen.tolist())
        place = slice(start, start := start + side.shape[1])
        torch.testing.assert_close(neurons.sets[:, place], torch.tensor(sets).double(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(neurons.neurons[place], torch.tensor(own).double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("with_network", [False, True])
def test_without_meta_training_the_nominal_step_stays(with_network: bool) -> None:
    body = make_body(with_network)
    for parameter in body.output.parameters():
        parameter.zero_()
    assert not gains(body, coordinates()).any()


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("with_network", [False, True])
def test_gains_move_with_the_order_of_eigenvectors_whatever_their_signs(with_network: bool, move: str) -> None:
    body, (rows, columns), each = make_body(with_network), MOVES[move], coordinates()
    gain, other = (gains(body, one) for one in (each, moved(each, rows, columns)))
    assert gain.abs().min() > 0
    torch.testing.assert_close(other, rows.abs().mT @ gain @ columns.abs(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("with_network", [False, True])
def test_the_order_of_data_points_is_immaterial(with_network: bool) -> None:
    body, each = make_body(with_network), coordinates()
    other = each._replace(rows=TurnedRows(*(side.flip(1) for side in each.rows)))
    torch.testing.assert_close(gains(body, other), gains(body, each))


def test_gains_of_coordinates_without_signal_are_finite() -> None:
    each, body = coordinates(), make_body(False)
    squares, noise = each.squares.clone(), each.noise.clone()
    squares[..., 0], noise[..., 0] = 1e-32, 1e-32
    each = each._replace(squares=squares, noise=noise)
    assert gains(body, each).abs().max() < 1e3
