"""Activations that are computed anew in the backward pass (gradient checkpointing)."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from gmn_optim import GMNOptimizer
from tests.cases import assert_same, loss_of, train
from tests.integrations.checks import assert_served

Run = Callable[[nn.Module, Tensor], Tensor]

JOINED = pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="reentrant checkpoints run their block without gradients, so nothing is known of its "
    "neurons and spaces are not joined: layers are served, each with spaces of its own",
)
WAYS = {
    "not reentrant": partial(checkpoint, use_reentrant=False),
    "reentrant": partial(checkpoint, use_reentrant=True),
    "in segments": lambda block, inputs: checkpoint_sequential(block, 2, inputs, use_reentrant=False),
    "not deterministic": partial(checkpoint, use_reentrant=False, determinism_check="none", early_stop=False),
}


class Blocks(nn.Module):
    """A layer, a block that may be checkpointed, and a layer.

    Args:
        run: Calls the block; None for the ordinary way.
    """

    def __init__(self, run: Run | None = None) -> None:
        super().__init__()
        self.first, self.last, self.run = nn.Linear(5, 8), nn.Linear(8, 3), run
        self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 8), nn.Tanh())

    def forward(self, inputs: Tensor) -> Tensor:
        """Return outputs (b, 3)."""
        hidden = torch.relu(self.first(inputs))
        return self.last(self.block(hidden) if self.run is None else self.run(self.block, hidden))


def make_blocks(run: Run | None = None) -> Blocks:
    """Return the same model at every call."""
    torch.manual_seed(0)
    return Blocks(run)


@pytest.mark.parametrize(
    "run", [pytest.param(run, id=name, marks=JOINED if name == "reentrant" else ()) for name, run in WAYS.items()]
)
def test_checkpointing_changes_no_weight(batches, run) -> None:
    model, twin = make_blocks(run), make_blocks()
    optimizer = GMNOptimizer(model)
    for each, its_own in ((model, optimizer), (twin, GMNOptimizer(twin))):
        torch.manual_seed(1)
        train(each, its_own, batches)
    assert_served(optimizer, len(batches))
    assert_same(model, twin, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("run", WAYS.values(), ids=WAYS)
def test_checkpointed_blocks_are_served(batches, run) -> None:
    model = make_blocks(run)
    optimizer, before = GMNOptimizer(model), loss_of(model, batches[0]).item()
    assert train(model, optimizer, batches * 3) < 0.8 * before
    assert_served(optimizer, 36)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_with_accumulation_and_autocast_is_served(batches, use_reentrant) -> None:
    model = make_blocks(partial(checkpoint, use_reentrant=use_reentrant))
    optimizer = GMNOptimizer(model)
    for batch in batches:
        optimizer.zero_grad()
        for micro in batch.split(4):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, micro) / 2
            loss.backward()
        optimizer.step()
    assert_served(optimizer, len(batches))
