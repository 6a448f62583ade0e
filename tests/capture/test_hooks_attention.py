"""The weights inside attention are captured as if they were layers that are called."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from gmn_optim.capture import GradientCapture, capture_gradients
from gmn_optim.testing import assert_recomposes

# Claims of exactness are made in float64.
pytestmark = pytest.mark.usefixtures("seeded", "double_precision")


class Attending(nn.Module):
    """A layer, attention over what it returns, and a layer."""

    def __init__(self, batch_first: bool, cross: bool = False, **options: object) -> None:
        super().__init__()
        self.first, self.last, self.cross = nn.Linear(3, 4), nn.Linear(4, 2), cross
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Return (b, p, 2) from (b, p, 3)."""
        x = self.first(x)
        query = x if self.attention.batch_first else x.transpose(0, 1)
        memory = query.tanh() if self.cross else query
        output = self.attention(query=query, key=memory, value=memory, need_weights=False)[0]
        return self.last(output if self.attention.batch_first else output.transpose(0, 1))


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"add_bias_kv": True}, {"cross": True}])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("shape", [(5, 3, 3), (1, 3, 3), (5, 1, 3)])
def test_attention_is_explained_for_each_data_point(
    shape: tuple[int, ...], batch_first: bool, options: dict[str, object]
) -> None:
    model, x = Attending(batch_first, **options), torch.randn(shape)
    with GradientCapture(model) as capture:
        assert {"attention", "attention.out_proj"} < set(capture.layers)
        model(x).square().sum().backward()
    verdicts = capture.verify()
    assert len(verdicts) == 4 and all(verdict.explained for verdict in verdicts.values()), verdicts
    gradients, parameters = capture.gradients(), list(model.parameters())
    each = [torch.autograd.grad(model(one[None]).square().sum(), parameters) for one in x]
    expected = dict(zip(parameters, map(torch.stack, zip(*each, strict=True)), strict=True))
    for layer, served in capture.served_parameters().items():
        for slot, parameter in served.items():
            torch.testing.assert_close(gradients.mean_gradient(layer)[slot], parameter.grad, rtol=1e-9, atol=1e-12)
            found = gradients.per_sample_gradients(layer)[slot]
            torch.testing.assert_close(found, expected[parameter], rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # vmap over attention
def test_attention_recomposes_like_any_layer() -> None:
    assert_recomposes(Attending(True), torch.randn(5, 3, 3))


def test_separate_projections_leave_the_out_projection() -> None:
    class Separate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=3, batch_first=True)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            return self.attention(x, memory, memory)[0]

    model = Separate()
    with GradientCapture(model) as capture:
        model(torch.randn(5, 3, 4), torch.randn(5, 6, 3)).square().sum().backward()
    assert set(capture.layers) == {"attention.out_proj"} and capture.verify()["attention.out_proj"].explained
    # Its attention is not watched, so nothing tells which rows are one data point's.
    assert capture.gradients()["attention.out_proj"].activations.shape == (15, 1, 4)


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_transformer_layers_are_explained(kind: type[nn.Module]) -> None:
    model = kind(4, 2, 8, dropout=0.0, batch_first=True)
    inputs = (torch.randn(5, 3, 4), torch.randn(5, 6, 4))[: 1 if kind is nn.TransformerEncoderLayer else 2]
    with GradientCapture(model) as capture:
        for _ in range(2):
            model(*inputs).square().sum().backward()
    verdicts = capture.verify()
    attentions = ["self_attn"] if kind is nn.TransformerEncoderLayer else ["self_attn", "multihead_attn"]
    assert {"linear1", "linear2", *attentions, *(f"{name}.out_proj" for name in attentions)} <= set(verdicts)
    assert all(verdict.explained for verdict in verdicts.values()), verdicts


def test_a_frozen_in_projection_leaves_the_out_projection() -> None:
    model = Attending(True)
    model.attention.in_proj_weight.requires_grad_(False)
    model.attention.in_proj_bias.requires_grad_(False)
    with GradientCapture(model) as capture:
        model(torch.randn(5, 3, 3)).square().sum().backward()
    assert "attention" not in capture.gradients() and "attention" not in capture.verify()
    assert capture.gradients()["attention.out_proj"].activations.shape == (5, 3, 4)
    assert all(verdict.explained for verdict in capture.verify().values())


def test_attention_that_is_called_by_itself_is_captured() -> None:
    model = Attending(True)
    with GradientCapture(model) as capture:
        x = model.first(torch.randn(5, 3, 3))
        model.attention(x, x, x)[0].square().sum().backward()
    verdicts = capture.verify()
    assert set(verdicts) == {"first", "attention", "attention.out_proj"}
    assert all(verdict.explained for verdict in verdicts.values())


def test_calls_of_attention_by_itself_are_forward_passes_each() -> None:
    model, x = Attending(True), torch.randn(5, 3, 4)
    with GradientCapture(model) as capture:
        sum(model.attention(x, x, x)[0].square().sum() for _ in range(2)).backward()
    assert capture.gradients()["attention"].activations.shape == (10, 3, 4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_attention(reentrant: bool) -> None:
    class Checkpointed(Attending):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=reentrant)

    model, x = Checkpointed(True), torch.randn(5, 3, 3, requires_grad=True)
    with GradientCapture(model) as capture:
        for _ in range(2):
            model.zero_grad()
            model(x).square().sum().backward()
    verdicts = capture.verify()
    assert verdicts["first"].explained and verdicts["last"].explained
    for name in ("attention", "attention.out_proj"):
        assert verdicts[name].explained == reentrant and (reentrant or "checkpoint" in verdicts[name].reason)
    assert capture.gradients()["first"].activations.shape == (5, 3, 3)


def test_a_retained_graph_is_captured_twice() -> None:
    model = Attending(True)
    with GradientCapture(model) as capture:
        loss = model(torch.randn(5, 3, 3)).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    assert capture.gradients()["attention"].activations.shape == (10, 3, 4)
    assert all(verdict.explained for verdict in capture.verify().values())


def test_autocast_is_explained() -> None:
    model = Attending(True).float()
    with GradientCapture(model) as capture, torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(5, 3, 3, dtype=torch.float32)).float().square().sum().backward()
    verdicts = capture.verify()
    assert len(verdicts) == 4 and all(verdict.explained for verdict in verdicts.values()), verdicts


def test_a_paused_or_closed_capture_hears_nothing() -> None:
    model = Attending(True)
    with GradientCapture(model) as capture:
        with capture.paused():
            model(torch.randn(5, 3, 3)).sum().backward()
        assert not capture.gradients()
        output = model(torch.randn(5, 3, 3))
    output.sum().backward()
    assert not capture.gradients()


def test_neither_model_nor_capture_is_kept_alive() -> None:
    model = Attending(True)
    capture = GradientCapture(model)
    output = model(torch.randn(5, 3, 3))
    of_model, of_capture, of_recorder = weakref.ref(model), weakref.ref(capture), weakref.ref(capture._recorder)
    gc.disable()
    try:
        del capture
        assert of_capture() is None and of_recorder() is None
        del model
        assert of_model() is None
        output.sum().backward()
    finally:
        gc.enable()


def test_functional_capture_passes_over_attention() -> None:
    model, x = Attending(True), torch.randn(5, 3, 3)
    parameters = dict(model.named_parameters())
    captured = capture_gradients(model, lambda p: functional_call(model, p, (x,)).square().sum(), parameters)
    assert set(captured.factors) == {"first", "last"}
