"""Hooks come and go with their capture; nothing stale, nothing left behind, no growing memory."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn

from gmn_optim.capture import GradientCapture, hooks
from gmn_optim.errors import CaptureError
from tests.cases import count_hooks


def mlp() -> nn.Sequential:
    """Return a small network."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def train_once(model: nn.Module) -> Tensor:
    """Run one forward and backward pass."""
    loss = model(torch.randn(5, 3)).square().sum()
    loss.backward()
    return loss


def test_closing_removes_every_hook_and_keeps_what_was_captured() -> None:
    model = mlp()
    capture = GradientCapture(model)
    assert count_hooks(model) == 4 and not capture.closed
    train_once(model)
    capture.close()
    capture.close()
    assert count_hooks(model) == 0 and capture.closed
    assert set(capture.gradients()) == {"0", "2"}


def test_a_hook_on_a_graph_does_not_fire_into_a_closed_capture() -> None:
    model = mlp()
    capture = GradientCapture(model)
    loss = model(torch.randn(5, 3)).sum()
    capture.close()
    loss.backward()
    assert not capture.gradients()


def test_deleting_the_capture_removes_the_hooks() -> None:
    model = mlp()
    capture = GradientCapture(model)
    loss = model(torch.randn(5, 3)).sum()
    gone = weakref.ref(capture)
    gc.disable()
    try:
        del capture
        assert gone() is None and count_hooks(model) == 0
    finally:
        gc.enable()
    loss.backward()


def test_the_capture_does_not_keep_the_model() -> None:
    model = mlp()
    gone = weakref.ref(model)
    capture = GradientCapture(model)
    loss = train_once(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
    assert loss.isfinite() and not capture.gradients() and not capture.layers
    with pytest.raises(CaptureError):
        capture.attach()


def test_a_copied_model_has_no_working_hooks() -> None:
    model = mlp()
    capture = GradientCapture(model)
    twin = copy.deepcopy(model)
    train_once(twin)
    assert not capture.gradients()
    with GradientCapture(twin) as second:
        train_once(twin)
    assert set(second.gradients()) == {"0", "2"}


def test_a_hooked_model_can_be_pickled() -> None:
    model = mlp()
    capture = GradientCapture(model)
    train_once(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        capture.clear()
        train_once(twin)
        assert not capture.gradients()


def test_a_copied_capture_watches_nothing() -> None:
    model = mlp()
    capture = GradientCapture(model, rows=3)
    train_once(model)
    for twin in (copy.deepcopy(capture), pickle.loads(pickle.dumps(capture))):
        assert twin.closed and not twin.gradients() and not twin.verify() and not twin.wiring()
        with pytest.raises(CaptureError):
            twin.attach()
    assert count_hooks(model) == 4


def test_two_captures_of_one_model_do_not_disturb_each_other() -> None:
    model = mlp()
    with GradientCapture(model) as first:
        with GradientCapture(model) as second:
            train_once(model)
        assert set(first.gradients()) == set(second.gradients())
        assert first.wiring() == second.wiring() and set(first.wiring()) == {"0", "2"}
        train_once(model)
    assert len(first.gradients()["0"].activations) == 10
    assert len(second.gradients()["0"].activations) == 5


@pytest.mark.parametrize("set_to_none", [True, False])
def test_nothing_stale_survives_zero_grad(set_to_none: bool) -> None:
    model = mlp()
    with GradientCapture(model) as capture:
        train_once(model)
        model.zero_grad(set_to_none=set_to_none)
        train_once(model)
        assert all(verdict.explained for verdict in capture.verify().values())
        assert len(capture.gradients()["0"].activations) == 5


def test_clear_drops_what_was_captured() -> None:
    model = mlp()
    with GradientCapture(model) as capture:
        train_once(model)
        capture.clear()
        assert not capture.gradients()


def test_paused_and_disabled_captures_see_nothing() -> None:
    model = mlp()
    with GradientCapture(model) as capture:
        with capture.paused():
            train_once(model)
        capture.enabled = False
        train_once(model)
        capture.enabled = True
        loss = model(torch.randn(5, 3)).sum()
        with capture.paused():
            loss.backward()
        assert not capture.gradients()
        train_once(model)
        assert len(capture.gradients()["0"].activations) == 5


def test_attaching_again_follows_the_model() -> None:
    model = mlp()
    with GradientCapture(model) as capture:
        removed = model[2]
        model[2] = nn.Linear(4, 4)
        model.append(nn.Linear(4, 1))
        capture.attach()
        capture.attach()
        assert list(capture.layers) == ["0", "2", "3"] and count_hooks(removed) == 0 and count_hooks(model) == 5
        train_once(model)
        assert set(capture.gradients()) == {"0", "2", "3"}


def test_a_closed_capture_can_be_entered_again() -> None:
    model = mlp()
    capture = GradientCapture(model)
    capture.close()
    with capture:
        train_once(model)
    assert set(capture.gradients()) == {"0", "2"} and repr(capture) == "GradientCapture(2 layers, closed)"


def test_a_failed_forward_pass_is_forgotten() -> None:
    model = mlp()
    with GradientCapture(model) as capture:
        with pytest.raises(RuntimeError):
            model(torch.randn(5, 7))
        train_once(model)
        assert capture.wiring()["2"].inputs == capture.wiring()["0"].outputs
        assert capture.gradients()["0"].activations.shape == (5, 1, 3)


def test_memory_does_not_grow() -> None:
    model = mlp()
    counts = []
    with GradientCapture(model) as capture:
        for step in range(50):
            model(torch.randn(5, 3))
            model.zero_grad()
            train_once(model)
            capture.verify()
            if step in (5, 49):
                gc.collect()
                counts.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))
    assert counts[0] == counts[1]


def test_a_budget_frees_what_the_layer_read() -> None:
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(50, 3)
    with GradientCapture(model, rows=2):
        gone = weakref.ref(x.untyped_storage())
        loss = model(x).sum()
        loss.backward()
        del x
        gc.collect()
        assert gone() is None and loss.isfinite()


def test_saving_a_captured_output_does_not_warn() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with GradientCapture(model):
        output = model(torch.randn(5, 3))
        torch.save(output.detach(), io.BytesIO())
        pickle.dumps(output)


def test_layers_are_grouped_once_while_a_capture_is_steady(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls, group = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), [], hooks.group_layers
    monkeypatch.setattr(hooks, "group_layers", lambda layers: calls.append(1) or group(layers))
    with GradientCapture(model) as capture:
        model(torch.ones(4, 2)).sum().backward()
        with capture.steady():
            assert list(capture.verify()) == list(capture.gradients()) == list(capture.layers) == ["0", "1"]
        assert len(calls) == 1
        model[1].weight = model[0].weight
        assert len(capture.served_parameters()) == 1 and len(calls) == 2
