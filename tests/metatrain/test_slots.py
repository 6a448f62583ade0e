import pytest
import torch

from gmn_optim.metatrain import FamilyConfig, MetaShape
from gmn_optim.metatrain.evaluation import measure
from gmn_optim.metatrain.seeds import PURPOSES, derive_generator
from gmn_optim.metatrain.slots import Slot, SlotProgress, draw_held_out, draw_horizon, draw_perturbations
from gmn_optim.metatrain.standardization import log_meta_loss
from gmn_optim.rule import RuleConfig
from gmn_optim.tasks import tasks
from tests.metatrain.families import RULE, SETTINGS, TinyFamily, build_rule

CONFIG = FamilyConfig(**SETTINGS)
AVERAGED = RuleConfig(nominal="kronecker_schedule_free", body="controller", width=4)


def test_generators_of_different_places_and_purposes_differ():
    places = [(0, "task", 0, 1), (1, "task", 0, 1), (0, "task", 1, 0), (0, "task", 1, 1)]
    places += [(0, purpose, 0, 1) for purpose in PURPOSES if purpose != "task"]
    drawn = {torch.rand((), generator=derive_generator(*place)).item() for place in places}
    assert len(drawn) == len(places)


def test_horizons_are_log_uniform_whole_truncations():
    config = FamilyConfig()
    drawn = torch.tensor([draw_horizon(config, slot, draw) for slot in range(8) for draw in range(1, 50)])
    assert (drawn % 50 == 0).all() and drawn.min() >= 200 and drawn.max() <= 2_000
    assert 550 < drawn.double().log().mean().exp() < 730


def test_first_horizons_are_staggered():
    config = FamilyConfig(shortest_horizon=800, longest_horizon=800)
    assert [draw_horizon(config, slot, 0) for slot in range(8)] == [100, 200, 300, 400, 500, 600, 700, 800]


def test_both_sides_of_a_pair_start_alike_and_pairs_differ():
    slot = Slot(TinyFamily(), build_rule(RULE, seed=0), CONFIG, number=1, draw=4)
    again = Slot(TinyFamily(), build_rule(RULE, seed=0), CONFIG, number=1, draw=4)
    for leaf, same in zip(*(torch.utils._pytree.tree_leaves(s.state) for s in (slot, again)), strict=True):
        assert torch.equal(leaf[:2], leaf[2:]) and torch.equal(leaf, same)


def test_sides_without_perturbations_have_equal_losses():
    rule = build_rule(RULE, seed=0)
    slot = Slot(TinyFamily(), rule, CONFIG, number=1, draw=4)
    meta = {name: value.detach() for name, value in rule.named_parameters()}
    shape = MetaShape(meta)
    flat = shape.flatten(meta)
    positive, negative = slot.advance(shape, flat, torch.zeros(2, len(flat)), SlotProgress(4, 0, 20))
    assert torch.equal(positive, negative) and positive[0] != positive[1]


def test_perturbations_are_new_at_every_step_and_nothing_where_masked():
    mask = torch.tensor([1.0, 0.0, 1.0])
    first, second, again = (draw_perturbations(CONFIG, 0, step, mask) for step in (0, 1, 0))
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert first.shape == (2, 3) and not first[:, 1].any() and first[:, 0].all()


@pytest.mark.parametrize("averages", [False, True])
def test_the_meta_loss_is_that_of_held_out_data_as_often_as_asked_for(averages):
    rule = build_rule(AVERAGED, seed=0)
    meta = {name: value.detach() for name, value in rule.named_parameters()}
    shape = MetaShape(meta)
    flat = shape.flatten(meta)
    config = FamilyConfig(**{**SETTINGS, "truncation": 6, "held_out_every": 3, "averages": averages})
    slot, twin = (Slot(TinyFamily(), rule, config, number=1, draw=4) for _ in range(2))
    positive, _ = slot.advance(shape, flat, torch.zeros(2, len(flat)), SlotProgress(4, 0, 18))
    generator = derive_generator(config.seed, "batches", 1, 4, 0)
    batches = twin.unroll.batches(generator, 6, 2)
    held_out, found = draw_held_out(twin.task, generator), []
    for first in (0, 3):
        some = tuple(torch.cat([part[first : first + 3]] * 2, dim=1) for part in batches)
        four = shape.unflatten(flat.expand(4, -1))
        twin.state, _ = twin.unroll.run(four, twin.state, some)
        found.append(measure(twin.unroll, twin.state, held_out, four if averages else None))
    assert torch.equal(found[-1], measure(twin.unroll, twin.state, held_out)) is not averages
    wanted = log_meta_loss(torch.stack(found), twin.task, 0, 18)
    torch.testing.assert_close(positive, wanted[:2])
    trained = Slot(TinyFamily(), rule, FamilyConfig(**SETTINGS), number=1, draw=4)
    assert not torch.equal(positive, trained.advance(shape, flat, torch.zeros(2, len(flat)), SlotProgress(4, 0, 18))[0])


def test_held_out_examples_are_drawn_from_the_validation_set():
    task = tasks["validation-letters-mlp"]()
    inputs, labels = draw_held_out(task, torch.Generator().manual_seed(0))
    every, known = task.held_out("validation")
    assert len(inputs) == len(labels) == 256
    for row, label in zip(inputs[:5], labels[:5], strict=True):
        places = (every == row).all(1).nonzero()[:, 0]
        assert label in known[places]
    assert torch.equal(draw_held_out(task, torch.Generator().manual_seed(0))[0], inputs)
