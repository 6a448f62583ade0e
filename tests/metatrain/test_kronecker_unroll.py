"""Meta-training on the nominal term ``kronecker_adam``: bases are made anew by the unroll's own clock."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gmn_optim import GMNOptimizer
from gmn_optim.cli import main
from gmn_optim.metatrain import MetaTrainer, TrainerConfig
from gmn_optim.metatrain.unroll import Unroll, UnrollState
from gmn_optim.nn import GradMetaNetConfig
from gmn_optim.rule import RuleConfig, UpdateRule
from tests.cases import assert_same, make_rule, train
from tests.test_optimizer import TinyTask

NOMINAL = RuleConfig(nominal="kronecker_adam", body=None)
DS = replace(NOMINAL, body="ds", width=8)
ARMS = {"nominal": NOMINAL, "ds": DS, "ds+gmn": replace(DS, gradmetanet=GradMetaNetConfig(width=8))}


def test_many_steps_equal_many_inner_steps_of_meta_training() -> None:
    rule = UpdateRule(RuleConfig(nominal="kronecker_adam", body=None)).double().requires_grad_(False)
    task, generator = TinyTask(), torch.Generator().manual_seed(2)
    unroll = Unroll(task, rule)
    state = unroll.start(generator, 1)
    model = copy.deepcopy(task.module)
    model.load_state_dict(unroll.unflatten(tuple(flat[0] for flat in state.parameters)))
    optimizer = GMNOptimizer(model, weights=rule)
    batches = unroll.batches(generator, 25, 1)
    state, _ = unroll.run(unroll.meta_parameters(), state, batches)
    train(model, optimizer, list(batches[0][:, 0]))
    assert_same(model, dict(unroll.unflatten(tuple(flat[0] for flat in state.parameters))), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("arm", ["controller", "kronecker_schedule_free", "adam"])
def test_averages_are_those_that_the_optimizer_evaluates(arm: str) -> None:
    rules = [make_rule(arm, seed=seed).double() for seed in (1, 2)]
    unroll, generator = Unroll(TinyTask(), rules[0]), torch.Generator().manual_seed(2)
    meta = {
        name: torch.stack([dict(rule.named_parameters())[name] for rule in rules])
        for name in dict(rules[0].named_parameters())
    }
    state = unroll.start(generator, 2)
    models = [copy.deepcopy(unroll.task.module) for _ in rules]
    for k, model in enumerate(models):
        model.load_state_dict(unroll.unflatten(tuple(flat[k] for flat in state.parameters)))
    batches = unroll.batches(generator, 15, 2)
    state, _ = unroll.run(meta, state, batches)
    found = unroll.averages(meta, state)
    for k, (model, rule) in enumerate(zip(models, rules, strict=True)):
        optimizer = GMNOptimizer(model, weights=rule)
        train(model, optimizer, list(batches[0][:, k]))
        optimizer.eval()
        assert_same(model, dict(unroll.unflatten(tuple(flat[k] for flat in found))), rtol=1e-7, atol=1e-9)
    differ = [not torch.equal(a, b) for a, b in zip(found, state.parameters, strict=True)]
    assert all(differ) if arm != "adam" else not any(differ)


def test_trainings_of_different_ages_are_mapped_as_each_by_itself() -> None:
    rule = UpdateRule(RuleConfig(nominal="kronecker_adam", body=None)).double().requires_grad_(False)
    unroll, generator = Unroll(TinyTask(), rule), torch.Generator().manual_seed(2)
    old, _ = unroll.run(unroll.meta_parameters(), unroll.start(generator, 1), unroll.batches(generator, 14, 1))
    states = [old, unroll.start(generator, 1)]
    batches = unroll.batches(generator, 12, 2)
    leaves, spec = zip(*map(torch.utils._pytree.tree_flatten, states), strict=True)
    both: UnrollState = torch.utils._pytree.tree_unflatten(
        [torch.cat(pair) for pair in zip(*leaves, strict=True)], spec[0]
    )
    together, losses = unroll.run(unroll.meta_parameters(), both, batches)
    for k, state in enumerate(states):
        _, own = unroll.run(unroll.meta_parameters(), state, tuple(part[:, k : k + 1] for part in batches))
        torch.testing.assert_close(losses[:, k], own[:, 0], rtol=1e-9, atol=1e-12)
    assert together.rule.bases[0].age.tolist() == [26.0, 12.0]


@pytest.mark.parametrize(
    ("arm", "estimator"), [*((arm, "pes") for arm in ARMS), ("nominal", "backprop"), ("ds", "backprop")]
)
def test_every_arm_meta_trains(arm: str, estimator: str, tmp_path: Path) -> None:
    config = TrainerConfig(
        estimator=estimator, outer_steps=2, unrolls=4, truncation=5, warm_up=1, evaluation_seeds=(1,)
    )
    trainer = MetaTrainer(Unroll(TinyTask(), UpdateRule(ARMS[arm]).double()), config, tmp_path)
    before = trainer.meta.clone()
    after = trainer.run(progress=False)
    # a gradient that is not finite counts as zero, and moves nothing
    assert after.isfinite().all() and not torch.equal(before, after)


def test_the_command_line_knows_the_nominal_term(tmp_path: Path) -> None:
    settings = "--task quadratic --arm nominal --nominal kronecker_adam --outer-steps 1 --unrolls 2 --truncation 5"
    assert main(["meta-train", *settings.split(), "--quiet", "--folder", str(tmp_path)]) == 0
    assert (tmp_path / "meta-000001.safetensors").exists()
