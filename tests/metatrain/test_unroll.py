import shutil

import pytest
import torch
from torch import nn

from gmn_optim.capture import adapters
from gmn_optim.metatrain import Unroll
from gmn_optim.rule import RuleConfig, UpdateRule
from gmn_optim.tasks.base import AbstractTask
from gmn_optim.tasks.quadratic import QuadraticTask
from tests.tables import ARMS


class TinyTask(AbstractTask):
    """A regression with an MLP in float64, LayerNorm between, to have parameters without factors too."""

    horizon = 20
    loss_limit = 1e6

    def __init__(self):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.module = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 2)).double()

    def init_parameters(self, generator):
        return {
            name: torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.5
            for name, p in self.module.named_parameters()
        }

    def sample_batch(self, generator, shape=()):
        x = torch.randn((*shape, 7, 3), generator=generator, dtype=torch.float64)
        return x, x[..., :2].sin()

    def loss(self, parameters, batch):
        return (torch.func.functional_call(self.module, parameters, (batch[0],)) - batch[1]).square().mean()


def random_rule(config):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        rule = UpdateRule(config).double()
        with torch.no_grad():
            for parameter in rule.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return rule


def perturbed(unroll, count):
    generator = torch.Generator().manual_seed(5)
    return {
        name: value + 0.02 * torch.randn((count, *value.shape), generator=generator, dtype=value.dtype)
        for name, value in unroll.meta_parameters().items()
    }


@pytest.mark.parametrize("arm", ARMS)
def test_many_trainings_at_once_equal_each_by_itself(arm):
    unroll = Unroll(TinyTask(), random_rule(ARMS[arm]))
    generator = torch.Generator().manual_seed(0)
    state, meta, batches = unroll.start(generator, 3), perturbed(unroll, 3), unroll.batches(generator, 6, 3)
    together, losses = unroll.run(meta, state, batches)
    for k in range(3):
        alone = torch.utils._pytree.tree_map(lambda leaf, k=k: leaf[k : k + 1], (state, meta, losses))
        final, own = unroll.run(alone[1], alone[0], tuple(part[:, k : k + 1] for part in batches))
        torch.testing.assert_close(own[:, 0], losses[:, k])
        for mine, theirs in zip(final.parameters, together.parameters, strict=True):
            torch.testing.assert_close(mine[0], theirs[k])


@pytest.mark.parametrize("arm", ARMS)
def test_one_rule_for_all_equals_copies_of_it(arm):
    unroll = Unroll(TinyTask(), random_rule(ARMS[arm]))
    generator = torch.Generator().manual_seed(0)
    state, batches = unroll.start(generator, 2), unroll.batches(generator, 4, 2)
    shared = unroll.meta_parameters()
    copies = {name: value.expand(2, *value.shape) for name, value in shared.items()}
    torch.testing.assert_close(unroll.run(shared, state, batches)[1], unroll.run(copies, state, batches)[1])


def test_parameters_without_factors_stand_apart_under_a_rule_that_needs_them(own_registry):
    del adapters._ADAPTERS[nn.LayerNorm]
    unroll = Unroll(TinyTask(), random_rule(ARMS["slots"]))
    learned, nominal = unroll.layout.chunks
    assert [segment.name for segment in learned.segments] == ["0.weight", "3.weight", "0.bias", "3.bias"]
    assert [segment.name for segment in nominal.segments] == ["2.weight", "2.bias"]
    assert learned.learned and not nominal.learned
    assert all(chunk.learned for chunk in Unroll(TinyTask(), random_rule(ARMS["momentum+ds"])).layout.chunks)


def test_a_training_that_diverges_does_not_stop_the_others():
    unroll = Unroll(QuadraticTask(noise=0.0), UpdateRule(RuleConfig(body=None)))
    meta = {name: value.expand(2).clone() for name, value in unroll.meta_parameters().items()}
    meta["alpha.raw"] = torch.tensor([0.0, 3.0])
    state, losses = unroll.run(meta, unroll.start(torch.Generator(), 2), unroll.batches(torch.Generator(), 60, 2))
    assert losses[-1, 0] < 1 and not losses[-1, 1] < 1e6


def test_flattening_and_back_is_the_identity():
    unroll = Unroll(TinyTask(), random_rule(ARMS["slots"]))
    parameters = unroll.task.init_parameters(torch.Generator().manual_seed(0))
    for name, value in unroll.unflatten(unroll.flatten(parameters)).items():
        assert torch.equal(value, parameters[name])


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:::torch")
def test_fused_steps_agree_with_plain_ones():
    rule = random_rule(ARMS["momentum"])
    plain, fused = Unroll(TinyTask(), rule), Unroll(TinyTask(), rule, compiled=True)
    generator = torch.Generator().manual_seed(0)
    state, meta, batches = plain.start(generator, 2), perturbed(plain, 2), plain.batches(generator, 3, 2)
    with torch.no_grad():
        torch.testing.assert_close(fused.run(meta, state, batches)[1], plain.run(meta, state, batches)[1])
