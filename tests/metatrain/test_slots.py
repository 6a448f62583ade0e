import torch

from gmn_optim.metatrain import FamilyConfig, MetaShape
from gmn_optim.metatrain.seeds import PURPOSES, derive_generator
from gmn_optim.metatrain.slots import Slot, SlotProgress, draw_horizon, draw_perturbations
from tests.metatrain.families import RULE, SETTINGS, TinyFamily, build_rule

CONFIG = FamilyConfig(**SETTINGS)


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
