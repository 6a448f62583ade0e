import copy
import shutil

import pytest
import torch
from torch import nn

from gmn_optim import GMNOptimizer
from gmn_optim.metatrain import Unroll
from gmn_optim.rule import RuleConfig, UpdateRule
from gmn_optim.tasks import tasks
from gmn_optim.tasks.base import AbstractTask
from gmn_optim.tasks.quadratic import QuadraticTask
from tests import models
from tests.cases import assert_same, make_rule, train
from tests.tables import ARMS, Conv1D


class TinyTask(AbstractTask):
    """A regression with an MLP in float64, slopes between, to have parameters without factors too."""

    horizon = 20
    loss_limit = 1e6

    def __init__(self):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.module = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.PReLU(6), nn.Linear(6, 2)).double()

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


class ModelTask(AbstractTask):
    """A regression with a model in float64.

    Args:
        model: The model.
        draw: Makes inputs from a shape of several batches and a generator.
    """

    horizon = 20
    loss_limit = 1e6

    def __init__(self, model, draw):
        self.module, self.draw = model.double(), draw

    def init_parameters(self, generator):
        return {
            name: p.detach() + 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
            for name, p in self.module.named_parameters()
        }

    def sample_batch(self, generator, shape=()):
        return (self.draw(shape, generator),)

    def loss(self, parameters, batch):
        outputs = torch.func.functional_call(self.module, parameters, batch)
        return (outputs - torch.linspace(-1.0, 1.0, outputs.shape[-1], dtype=outputs.dtype)).square().mean()


def features(*size):
    return lambda shape, generator: torch.randn(*shape, *size, generator=generator, dtype=torch.float64)


def tokens(shape, generator):
    return torch.randint(0, models.VOCABULARY, (*shape, 4, models.TOKENS), generator=generator)


def without_key_biases():
    model = models.GPT(blocks=1)
    model.blocks[0].attention.k = nn.Linear(models.WIDTH, models.WIDTH, bias=False)
    return model


MODEL_TASKS = {
    "skip connections": (models.SkipMLP, features(7, 5)),
    "language model": (without_key_biases, tokens),
    "upsampling": (lambda: models.Upsampling(groups=2), features(4, 2, 4, 4)),
    "inputs first": (lambda: nn.Sequential(Conv1D(6, 3), nn.Tanh(), Conv1D(2, 6)), features(7, 3)),
}


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


@pytest.mark.parametrize("name", MODEL_TASKS)
@pytest.mark.parametrize("arm", ["slots", "moments"])
def test_a_training_takes_the_steps_of_the_optimizer(arm, name):
    torch.manual_seed(0)
    make, draw = MODEL_TASKS[name]
    rule = make_rule(arm).double()
    unroll, generator = Unroll(ModelTask(make(), draw), rule), torch.Generator().manual_seed(0)
    state, batches = unroll.start(generator, 1), unroll.batches(generator, 6, 1)
    model, start = copy.deepcopy(unroll.task.module), unroll.unflatten([chunk[0] for chunk in state.parameters])
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(start[parameter_name])
    final, losses = unroll.run(unroll.meta_parameters(), state, batches)
    train(model, GMNOptimizer(model, weights=rule), [batch[0] for batch in batches[0]])
    assert losses.isfinite().all()
    assert_same(model, unroll.unflatten([chunk[0] for chunk in final.parameters]), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", MODEL_TASKS)
def test_many_trainings_of_a_model_of_any_kind_equal_each_by_itself(name):
    torch.manual_seed(0)
    unroll, generator = (
        Unroll(ModelTask(MODEL_TASKS[name][0](), MODEL_TASKS[name][1]), make_rule("moments").double()),
        torch.Generator().manual_seed(0),
    )
    state, meta, batches = unroll.start(generator, 3), perturbed(unroll, 3), unroll.batches(generator, 4, 3)
    together, losses = unroll.run(meta, state, batches)
    for k in range(3):
        alone = torch.utils._pytree.tree_map(lambda leaf, k=k: leaf[k : k + 1], (state, meta))
        final, own = unroll.run(alone[1], alone[0], tuple(part[:, k : k + 1] for part in batches))
        torch.testing.assert_close(own[:, 0], losses[:, k])
        for mine, theirs in zip(final.parameters, together.parameters, strict=True):
            torch.testing.assert_close(mine[0], theirs[k])


def test_parameters_without_factors_stand_apart_under_a_rule_that_needs_them():
    unroll = Unroll(TinyTask(), random_rule(ARMS["slots"]))
    learned, nominal = unroll.layout.chunks
    assert [segment.name for segment in learned.segments] == ["0.weight", "3.weight", "0.bias", "3.bias"]
    assert [segment.name for segment in nominal.segments] == ["2.weight"]
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
@pytest.mark.parametrize("arm", ["momentum", "kronecker_adam"])
def test_fused_steps_agree_with_plain_ones(arm):
    rule = random_rule(ARMS[arm])
    plain, fused = Unroll(TinyTask(), rule), Unroll(TinyTask(), rule, compiled=True)
    generator = torch.Generator().manual_seed(0)
    state, meta, batches = plain.start(generator, 2), perturbed(plain, 2), plain.batches(generator, 3, 2)
    with torch.no_grad():
        torch.testing.assert_close(fused.run(meta, state, batches)[1], plain.run(meta, state, batches)[1])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_neuron_spaces_are_found_where_no_graph_is_recorded(mode):
    with mode():
        without = Unroll(tasks["fashion-mnist-mlp"](), make_rule("slots"))
    assert without.layout.spaces == Unroll(tasks["fashion-mnist-mlp"](), make_rule("slots")).layout.spaces
    assert without.layout.spaces.size == 64 + 32 + 10
