import pytest
import torch

from gmn_optim import GMNOptimizer, list_weights, load_weights
from gmn_optim.metatrain import Unroll
from gmn_optim.metatrain.export import replay
from gmn_optim.tasks import tasks
from tests.tables import WEIGHTS


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_shipped_file_loads_as_the_promised_rule(name):
    rule, card = load_weights(name)
    assert card.name == name and rule.config.arm == WEIGHTS[name]


def test_exactly_one_file_is_the_default():
    assert sum("default" in load_weights(name).card.aliases for name in list_weights()) == 1


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_shipped_file_replays_its_recorded_curve(name):
    rule, card = load_weights(name)
    unroll = Unroll(tasks[card.task](), rule)
    losses = replay(unroll, unroll.meta_parameters(), card.replay["seed"], len(card.replay["losses"]))
    torch.testing.assert_close(losses, torch.tensor(card.replay["losses"]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_card_states_its_figures_with_five_seeds(name):
    card = load_weights(name).card
    assert len(card.results["seeds"]) == 5
    assert len(card.results["adam"]["grid"]) == 20
    for arm in ("adam", "nominal", "rule"):
        assert len(card.results[arm]["best_loss_each"]) == 5
        assert set(card.results[arm]) >= {"best_loss", "steps_to_target", "factor"}
    assert len(card.results["nominal"]["grid"]) >= 10
    assert card.limits and card.commit and card.description and card.seconds > 0


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_learned_term_of_a_shipped_file_does_something(name):
    rule = load_weights(name).rule
    assert rule.body.output.weight.abs().max() > 1e-3
    if rule.config.gradmetanet is not None:
        assert rule.gradmetanet.product.to_weight.weight.abs().max() > 1e-3


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_shipped_file_trains_a_model_that_it_never_saw(name):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1))
    x = torch.randn(256, 5)
    y = x[:, :1] * x[:, 1:2]
    optimizer = GMNOptimizer(model, weights=name)
    losses = []
    for step in range(200):
        batch = torch.arange(step * 64, step * 64 + 64) % 256
        loss = torch.nn.functional.mse_loss(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
