"""Initial parameters are spread as torch spreads them."""

import math

import pytest
import torch
from torch import nn

from gmn_optim.errors import InvalidArgumentError
from gmn_optim.tasks.datasets import load_photograph
from gmn_optim.tasks.image_fit import ImageFitTask
from gmn_optim.tasks.layer_init import default_parameters

LAYERS = [nn.Linear(60, 80), nn.Conv2d(6, 80, 3), nn.Conv1d(6, 80, 3), nn.Embedding(60, 80), nn.LayerNorm(9)]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_torch_draws_likewise(layer: nn.Module, seeded: None) -> None:
    layer.reset_parameters()
    drawn = default_parameters(layer, torch.Generator().manual_seed(0))
    assert list(drawn) == [name for name, _ in layer.named_parameters()]
    for name, own in layer.named_parameters():
        assert drawn[name].shape == own.shape
        assert drawn[name].std().item() == pytest.approx(own.std().item(), rel=0.25, abs=1e-6)
        assert drawn[name].mean().item() == pytest.approx(own.mean().item(), abs=0.05)
    if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
        assert drawn["weight"].abs().max().item() == pytest.approx(layer.weight.abs().max().item(), rel=0.01)


def test_factors_leave_normalizations_alone() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    plain, doubled = (default_parameters(network, torch.Generator(), scale) for scale in (1.0, 2.0))
    torch.testing.assert_close(doubled["0.weight"], 2 * plain["0.weight"])
    assert torch.equal(doubled["1.weight"], torch.ones(4))


def test_other_layers_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="'weight' of BatchNorm1d; expected Linear"):
        default_parameters(nn.BatchNorm1d(3), torch.Generator())


def test_sirens_begin_as_their_paper_says() -> None:
    task = ImageFitTask(load_photograph("coffee"), (64, 64), "siren", frequency=20.0)
    parameters = task.init_parameters(torch.Generator().manual_seed(0))
    bounds = {"0.weight": 1 / 2, "2.weight": math.sqrt(6 / 64) / 20.0, "4.weight": math.sqrt(6 / 64) / 20.0}
    for name, bound in bounds.items():
        largest = parameters[name].abs().max().item()
        assert 0.9 * bound < largest <= bound * 1.000001
