import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from gmn_optim import CaptureWarning, GMNOptimizer, GradientCapture
from gmn_optim.capture import register_layer
from gmn_optim.capture.linear import LinearAdapter
from gmn_optim.errors import InvalidArgumentError, InvalidParameterError
from gmn_optim.routing import are_usable
from tests.cases import make_rule

ARM = "moments"


def test_one_output_neuron_does_not_make_wrong_factors_look_right() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    head = model[2]
    x = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with GradientCapture(model) as capture:
        hidden = model[:2](x)
        (model(x).square().mean() + linear(hidden.detach().cos(), head.weight).square().mean()).backward()
        verdict = capture.verify()["2"]
    assert not verdict.explained and verdict.residual > 0.01


def test_an_empty_batch_leaves_parameters_and_optimizer_usable() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    optimizer = GMNOptimizer(model, weights=make_rule(ARM))
    model(torch.randn(0, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_layers_that_are_not_trained_here_cause_no_warning() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    optimizer = GMNOptimizer(model, model[2].parameters(), weights=make_rule(ARM))
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()  # gradients of layer 0 pile up: nobody resets them
        optimizer.step()
    assert optimizer.stats().served_share == 1.0


def test_a_warning_points_at_the_line_that_called_step() -> None:
    model = nn.Linear(4, 3)
    optimizer = GMNOptimizer(model, weights=make_rule(ARM))
    linear(torch.randn(5, 4), model.weight, model.bias).sum().backward()
    with pytest.warns(CaptureWarning) as caught:
        optimizer.step()
    assert caught[0].filename == __file__


class Transposed(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


@register_layer(Transposed)
class TransposedAdapter(LinearAdapter):
    def gradient_matrix(self, module: nn.Module, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.mT

    def recompose(self, module, gradient):
        return {"weight": gradient.sum_of_outer_products().mT}

    def widths(self, module):
        return tuple(module.weight.shape)


def test_a_weight_that_is_stored_otherwise_gets_the_nominal_term_and_the_summary_says_why() -> None:
    model = nn.Sequential(Transposed(4, 6), nn.ReLU(), nn.Linear(6, 2))
    optimizer = GMNOptimizer(model, weights=make_rule(ARM))
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    row = optimizer.summary().rows[0]
    assert row.updated_by == "adam" and "parametrized" in row.because
    assert optimizer.summary().rows[1].updated_by != "adam"


def test_the_summary_does_not_blame_a_missing_adapter_for_a_shared_weight() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    rows = {row.parameter: row for row in GMNOptimizer(model, weights=make_rule(ARM)).summary().rows}
    assert "shared" in rows["2.bias"].because


def test_a_lazy_layer_is_to_be_called_once_first() -> None:
    with pytest.raises(InvalidParameterError, match="call the model once first"):
        GMNOptimizer(nn.Sequential(nn.LazyLinear(3)), weights=make_rule(ARM))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": "1"}, "Invalid learning rate: 1"),
        ({"weight_decay": None}, "Invalid weight_decay value: None"),
        ({"momentum": "a"}, "Invalid momentum value: a"),
    ],
)
def test_values_of_a_wrong_type_are_refused(arguments, message) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        GMNOptimizer(nn.Linear(2, 1), weights=None, **arguments)


def test_a_nominal_term_beside_weights_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="add weights=None"):
        GMNOptimizer(nn.Linear(2, 1), nominal="momentum", weights=make_rule(ARM))


def test_a_summary_of_many_parameters_takes_one_look_at_each() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(300)))
    optimizer = GMNOptimizer(model, weights=make_rule(ARM))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(optimizer.summary().rows) == 600


def test_large_elements_that_cancel_do_not_hide() -> None:
    gradients = [torch.tensor([1e25, -1e25]), torch.tensor([1.0, -1.0]), torch.full((1_000,), 1e18)]
    assert are_usable(gradients) == [False, True, True]
    assert are_usable([each.double() for each in gradients]) == [True, True, True]
