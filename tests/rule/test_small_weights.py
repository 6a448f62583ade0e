"""Networks with small weights: how they are told, and that their steps are those of the axes."""

import pytest
import torch
from torch import Tensor, nn

from gmn_optim import GMNOptimizer
from gmn_optim.rule import RuleConfig, UpdateRule
from gmn_optim.rule.small_weights import are_small, relative_sizes
from gmn_optim.tasks.image_fit import build_siren, siren_gain


def sizes_of(model: nn.Module) -> Tensor:
    """Return the relative sizes of the linear layers' weights."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    roots = torch.stack([module.weight.detach().square().mean().sqrt() for module in linear])
    return relative_sizes(roots, [module.in_features for module in linear])


def make_siren(*widths: int) -> nn.Module:
    """Return a SIREN with its own initialization."""
    model = build_siren(widths, 30.0)
    with torch.no_grad():
        for number, module in enumerate(each for each in model if isinstance(each, nn.Linear)):
            module.weight.mul_(siren_gain(module.in_features, 30.0, first=number == 0))
    return model


def make_gpt(width: int, blocks: int, std: float = 0.02) -> nn.Module:
    """Return the linear layers of a GPT: embedding, and per block queries to values, output, and two of the MLP."""
    layers = [nn.Linear(width, 200)]
    for _ in range(blocks):
        layers += [nn.Linear(width, 3 * width), nn.Linear(width, width)]
        layers += [nn.Linear(width, 4 * width), nn.Linear(4 * width, width)]
    for number, layer in enumerate(layers):
        into_stream = number and number % 2 == 0
        nn.init.normal_(layer.weight, std=std / (2 * blocks) ** 0.5 if into_stream else std)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("widths", [(2, 48, 48, 3), (2, 256, 256, 256, 1), (3, 64, 64, 64, 64, 1)])
def test_a_siren_is_small(widths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    assert are_small(sizes_of(make_siren(*widths)))


@pytest.mark.parametrize(("width", "blocks"), [(48, 2), (64, 4), (128, 4), (384, 6), (768, 12)])
def test_a_gpt_with_its_small_residual_projections_is_not(width: int, blocks: int) -> None:
    torch.manual_seed(0)
    assert not are_small(sizes_of(make_gpt(width, blocks)))


@pytest.mark.parametrize(
    "init", [nn.init.xavier_uniform_, nn.init.kaiming_normal_, nn.init.orthogonal_, nn.init.zeros_]
)
def test_common_initializations_are_not_small(init) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 1))
    for layer in model:
        init(layer.weight)
    assert not are_small(sizes_of(model))


def test_one_small_scale_of_all_weights_does_not_make_a_network_small() -> None:
    assert not are_small(torch.tensor([0.1, 0.1, 0.1]))


def test_a_small_last_layer_does_not_make_a_network_small() -> None:
    assert not are_small(torch.tensor([1.0, 0.1])) and not are_small(torch.tensor([1.0, 1.0, 0.05]))


def test_a_sirens_bases_stay_the_axes_and_others_turn() -> None:
    torch.manual_seed(0)
    for model, turned in ((make_siren(2, 16, 16, 3), False), (nn.Sequential(nn.Linear(2, 16), nn.Linear(16, 3)), True)):
        optimizer = GMNOptimizer(model)
        for _ in range(12):
            optimizer.zero_grad()
            (model(torch.rand(32, 2)) - torch.rand(32, 3)).square().mean().backward()
            optimizer.step()
        rows = optimizer.state[model[0].weight]["basis_rows"]
        assert torch.equal(rows, torch.eye(16).expand_as(rows)) is not turned


@pytest.mark.parametrize("body", [True, False])
def test_the_summary_says_that_a_siren_is_served_by_nobody_and_keeps_the_axes(body: bool) -> None:
    torch.manual_seed(0)
    model = make_siren(2, 16, 16, 3)
    optimizer = GMNOptimizer(model) if body else GMNOptimizer(model, weights=None, nominal="kronecker_schedule_free")
    model(torch.rand(32, 2)).square().mean().backward()
    optimizer.step()
    rows = {row.parameter: row for row in optimizer.summary().rows}
    assert all("the axes" in row.because for row in rows.values())
    assert all(row.updated_by == "kronecker_schedule_free" for row in rows.values())
    assert optimizer.stats().served_share == 0
    if body:
        assert "smaller than those of meta-training" in rows["2.weight"].because


def test_tables_tell_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 8))
    nn.init.normal_(model[0].weight, std=0.05)
    optimizer = GMNOptimizer(model)
    model(torch.arange(20)).square().mean().backward()
    optimizer.step()
    assert not any("the axes" in row.because for row in optimizer.summary().rows)


def test_meta_training_does_not_reach_memories_and_damping_of_a_small_network() -> None:
    rules = [UpdateRule(RuleConfig(nominal="kronecker_schedule_free", body=None)) for _ in range(2)]
    with torch.no_grad():
        for name in ("beta", "beta2", "damping"):
            getattr(rules[1].nominal, name).raw.fill_(0.1)
    ends = {}
    for make in (
        lambda: make_siren(2, 16, 16, 1),
        lambda: nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1)),
    ):
        for rule in rules:
            torch.manual_seed(0)
            model = make().double()
            optimizer, inputs = GMNOptimizer(model, weights=rule), torch.rand(32, 2).double()
            for _ in range(14):
                optimizer.zero_grad()
                (model(inputs) - inputs.prod(-1, keepdim=True)).square().mean().backward()
                optimizer.step()
            ends.setdefault(make, []).append([parameter.detach() for parameter in model.parameters()])
    same = [all(map(torch.allclose, *pair)) for pair in ends.values()]
    assert same == [True, False]
