"""Layers share neurons where a traced forward pass proves it, and nowhere else."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from gmn_optim.capture import GradientCapture, wiring
from gmn_optim.neurons import LayerWiring
from tests import models
from tests.cases import ReusedLayer, TiedEmbedding

pytestmark = pytest.mark.usefixtures("seeded")

Wiring = dict[str, LayerWiring]


class Pair(nn.Module):
    """Two layers and what happens between them."""

    def __init__(self, between: Callable[[Tensor], Tensor] | nn.Module, width: int = 4, read: int = 4) -> None:
        super().__init__()
        self.first, self.between, self.second = nn.Linear(3, width), between, nn.Linear(read, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the second layer makes of it."""
        return self.second(self.between(self.first(x)))


def wiring_of(model: nn.Module, *inputs: Tensor, **options: Tensor) -> Wiring:
    """Return what one forward pass proves."""
    with GradientCapture(model) as capture:
        model(*(inputs or (torch.randn(5, 3),)), **options)
    return capture.wiring()


def places(known: Wiring, reader: str, *writers: str) -> list[int | None]:
    """Return for each neuron that a layer reads where it stands among the outputs of others, None if it does not."""
    written = [name for writer in writers for name in known[writer].outputs]
    return [written.index(name) if name in written else None for name in known[reader].inputs]


def assert_strangers(known: Wiring, reader: str, writer: str) -> None:
    """Require that no neuron that a layer reads is one that another writes."""
    assert not set(known[reader].inputs) & set(known[writer].outputs)


@pytest.mark.parametrize(
    "between",
    [
        nn.Identity(), nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(), nn.LeakyReLU(inplace=True), nn.ELU(),
        nn.CELU(), nn.SELU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.SiLU(inplace=True), nn.Mish(), nn.Softplus(),
        nn.Hardswish(), nn.Hardtanh(), nn.ReLU6(), nn.Hardsigmoid(), nn.Tanh(), nn.Sigmoid(), nn.LogSigmoid(),
        nn.PReLU(), nn.PReLU(4), nn.Dropout(0.5), nn.Dropout(0.5, inplace=True), nn.Softsign(), nn.Threshold(0.1, 0),
        torch.sin, torch.cos, torch.exp, torch.abs, torch.neg, torch.square, torch.clone,
        lambda h: h * torch.sigmoid(1.7 * h), lambda h: 30 * h / 2 - torch.ones(4), lambda h: (h**2 + 1).log(),
        lambda h: h.double().float(), lambda h: torch.where(h > 0, h, 0.1 * h), lambda h: functional.relu(h).square(),
        nn.Softmax(-1), nn.AlphaDropout(0.5), nn.RReLU(), nn.Hardswish(inplace=True), nn.Mish(inplace=True),
        nn.LayerNorm(4), nn.LayerNorm(4, elementwise_affine=False), nn.RMSNorm(4),
        lambda h: functional.normalize(h, dim=-1),
        lambda h: functional.layer_norm(h, (4,), torch.ones(4), torch.ones(4)), lambda h: h + h.mean(-1, keepdim=True),
        lambda h: h.mT.mT, lambda h: h.view(-1).view(h.shape), lambda h: torch.cat([h[..., :2], h[..., 2:]], -1),
        lambda h: h.detach(), lambda h: h + torch.ones(5, *[1] * (h.dim() - 1)), lambda h: h.flip(-1).flip(-1),
        lambda h: h.unsqueeze(1).expand(-1, 3, *[-1] * (h.dim() - 1)).mean(1), lambda h: h.cumsum(0),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 3)])
def test_neurons_stay_the_same_through(between: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
    if len(shape) == 3 and getattr(between, "num_parameters", 1) > 1:
        shape = (5, 4, 3)  # slopes per channel belong to axis 1
    known = wiring_of(Pair(between), torch.randn(shape))
    assert places(known, "second", "first") == [0, 1, 2, 3]
    assert len(set(known["first"].outputs)) == 4
    assert [known[name].reads_model_input for name in ("first", "second")] == [True, False]
    assert [known[name].is_model_output for name in ("first", "second")] == [False, True]


MOVES: dict[str, tuple[Callable[[Tensor], Tensor], list[int | None]]] = {
    "another order": (lambda h: h[:, [1, 0, 3, 2]], [1, 0, 3, 2]),
    "flipped": (lambda h: h.flip(-1), [3, 2, 1, 0]),
    "rolled": (lambda h: h.roll(1, -1), [3, 0, 1, 2]),
    "halves exchanged": (lambda h: torch.cat([h[:, 2:], h[:, :2]], 1), [2, 3, 0, 1]),
    "a part": (lambda h: h[:, 1:3], [1, 2]),
    "every other": (lambda h: h[:, ::2], [0, 2]),
    "repeated": (lambda h: h.repeat(1, 2), [0, 1, 2, 3, 0, 1, 2, 3]),
    "repeated one by one": (lambda h: h.repeat_interleave(2, 1), [0, 0, 1, 1, 2, 2, 3, 3]),
    "beside a constant": (lambda h: torch.cat([torch.ones(5, 2), h], 1), [None, None, 0, 1, 2, 3]),
    "padded": (lambda h: functional.pad(h, (0, 1)), [0, 1, 2, 3, None]),
    "heads": (lambda h: h.view(5, 2, 2).transpose(1, 2).reshape(5, 4), [0, 2, 1, 3]),
    "one neuron": (lambda h: h[:, :1], [0]),
}


@pytest.mark.parametrize("move", MOVES)
def test_moved_neurons_are_found_where_they_are(move: str) -> None:
    between, expected = MOVES[move]
    assert places(wiring_of(Pair(between, read=len(expected))), "second", "first") == expected


def shuffle(h: Tensor) -> Tensor:
    """Write one half over the other."""
    h[:, :2] = h[:, 2:].clone()
    return h


def fill(h: Tensor) -> Tensor:
    """Write over everything."""
    return h.copy_(torch.ones(4, 4))


STRANGERS: dict[str, Callable[[Tensor], Tensor]] = {
    "a product with a matrix": lambda h: h @ torch.ones(4, 4),
    "a linear function": lambda h: functional.linear(h, torch.ones(4, 4)),
    "products of neurons": lambda h: h.t() @ h,
    "a running sum": lambda h: h.cumsum(-1),
    "an order": lambda h: h.sort(-1).values,
    "the largest": lambda h: h.topk(4).values,
    "an outer sum": lambda h: h + h.t(),
    "an outer product": lambda h: h[0] * h[0].unsqueeze(1),
    "a triangle": torch.tril,
    "frequencies": lambda h: torch.fft.fft(h).abs(),
    "an orthogonal basis": lambda h: torch.linalg.qr(h).Q,
    "neighbours": lambda h: functional.avg_pool1d(h.unsqueeze(0), 3, 1, 1)[0],
    "a copy of one half over the other": shuffle,
    "another tensor written over it": fill,
    "a tensor that torch knows nothing of": lambda h: torch.from_numpy(h.detach().numpy().copy()),
    "nothing at all": lambda h: torch.ones(4, 4),
}


@pytest.mark.parametrize("between", STRANGERS)
def test_nothing_is_proven_through(between: str) -> None:
    assert_strangers(wiring_of(Pair(STRANGERS[between]), torch.randn(4, 3)), "second", "first")


def test_a_broadcast_neuron_is_read_several_times() -> None:
    assert places(wiring_of(Pair(lambda h: h * torch.ones(4), width=1)), "second", "first") == [0, 0, 0, 0]


def test_neurons_that_an_operation_mixes_with_each_other_are_one() -> None:
    known = wiring_of(Pair(lambda h: h * h.roll(1, -1)))
    assert len(set(known["first"].outputs)) == 1 and known["second"].inputs == known["first"].outputs


# ---------------------------------------------------------------------- streams


class Residual(nn.Module):
    """A residual sum of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs (b, 2)."""
        h = self.first(x)
        return self.third(h + self.second(h.relu()))


class ResidualInPlace(Residual):
    """The same with the sum in place."""

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs (b, 2)."""
        h = self.first(x)
        h += self.second(h.relu())
        return self.third(h)


@pytest.mark.parametrize("kind", [Residual, ResidualInPlace])
def test_what_is_summed_is_one_stream_of_neurons(kind: type[nn.Module]) -> None:
    known = wiring_of(kind())
    assert known["first"].outputs == known["second"].inputs == known["second"].outputs == known["third"].inputs


def test_two_layers_may_read_one() -> None:
    class Branching(Residual):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.first(x).relu()
            return self.second(h), self.third(h)

    known = wiring_of(Branching())
    assert known["first"].outputs == known["second"].inputs == known["third"].inputs
    assert [known[name].is_model_output for name in ("first", "second", "third")] == [False, True, True]


def test_each_part_of_a_split_is_read_by_itself() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.one, self.other = nn.Linear(3, 7), nn.Linear(4, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            one, other = self.both(x).split([4, 3], -1)
            return self.one(one) * self.other(other).sigmoid()

    known = wiring_of(Split())
    assert places(known, "one", "both") == [0, 1, 2, 3] and places(known, "other", "both") == [4, 5, 6]
    assert known["one"].outputs == known["other"].outputs


def test_what_is_put_together_is_read_as_neurons_of_each() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.last = nn.Linear(3, 4), nn.Linear(3, 2), nn.Linear(9, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.cat([self.other(x), x, self.one(x)], -1))

    known = wiring_of(Dense())
    assert places(known, "last", "one", "other") == [4, 5, None, None, None, 0, 1, 2, 3]
    assert known["last"].inputs[2:5] == known["one"].inputs == known["other"].inputs


def test_a_layer_reads_unknown_neurons_under_the_same_names_as_another() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Linear(3, 2), nn.Linear(5, 4), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.cat([self.one(x), torch.ones(5, 3)], -1)
            return self.two(h) + self.three(h)

    known = wiring_of(Two())
    assert known["two"].inputs == known["three"].inputs and len(set(known["two"].inputs)) == 5


@pytest.mark.parametrize("gate", [functional.glu, lambda h: h[..., :4] * functional.silu(h[..., 4:])])
def test_a_gate_and_what_it_gates_are_one_neuron(gate: Callable[[Tensor], Tensor]) -> None:
    known = wiring_of(Pair(gate, width=8))
    assert known["first"].outputs == 2 * known["second"].inputs and len(set(known["second"].inputs)) == 4


def test_reused_layers_read_what_they_write() -> None:
    known = wiring_of(ReusedLayer(), torch.randn(8, 5))
    assert known["inner"].inputs == known["inner"].outputs == known["last"].inputs
    assert not known["inner"].reads_model_input


def test_tied_layers_are_known_one_by_one() -> None:
    tied = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    tied[2].weight = tied[0].weight
    known = wiring_of(tied)
    assert known["0"].outputs == known["2"].inputs and known["2"].outputs == known["4"].inputs
    assert known["0"].reads_model_input and not known["2"].reads_model_input


# ---------------------------------------------------------------------- further layer kinds


def image_model(*between: nn.Module, read: int) -> nn.Sequential:
    """Return a convolution, what is between, and a layer."""
    return nn.Sequential(nn.Conv2d(1, 3, 3), *between, nn.Linear(read, 2))


IMAGE_MODELS = {
    "flattened": (image_model(nn.Flatten(), read=48), 16),
    "pooled": (image_model(nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), read=12), 4),
    "averaged": (image_model(nn.AdaptiveAvgPool2d(1), nn.Flatten(), read=3), 1),
    "unflattened again": (image_model(nn.Flatten(), nn.Unflatten(1, (3, 16)), nn.Flatten(), read=48), 16),
    "upsampled": (image_model(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Flatten(), read=192), 64),
    "padded and cropped": (image_model(nn.ZeroPad2d(1), nn.ZeroPad2d(-1), nn.Flatten(), read=48), 16),
    "dropped": (image_model(nn.Dropout2d(0.5), nn.Flatten(), read=48), 16),
}


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_channels_are_read_once_for_each_of_their_positions(name: str) -> None:
    model, positions = IMAGE_MODELS[name]
    known = wiring_of(model, torch.randn(5, 1, 6, 6))
    assert places(known, str(len(model) - 1), "0") == [channel for channel in range(3) for _ in range(positions)]


@pytest.mark.parametrize("shape", [(5, 2, 6, 6), (2, 6, 6)])
@pytest.mark.parametrize(("groups", "taps"), [(1, 9), (3, 9)])
def test_a_convolution_reads_each_channel_once_for_every_tap(shape: tuple[int, ...], groups: int, taps: int) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 6, 3, groups=groups), nn.Conv2d(6, 2, 1))
    known = wiring_of(model, torch.randn(shape))
    assert places(known, "2", "0") == [channel for channel in range(3) for _ in range(taps)]
    assert known["2"].outputs == known["3"].inputs
    assert len(known["0"].inputs) == 18 and len(set(known["0"].inputs)) == 2 and known["0"].reads_model_input


@pytest.mark.parametrize("shape", [(5, 2, 6), (2, 6)])
def test_a_transposed_convolution_writes_each_channel_once_for_every_tap(shape: tuple[int, ...]) -> None:
    known = wiring_of(nn.Sequential(nn.ConvTranspose1d(2, 3, 4, 2), nn.Tanh(), nn.Conv1d(3, 2, 1)), torch.randn(shape))
    assert known["0"].outputs == tuple(name for name in known["2"].inputs for _ in range(4))
    assert len(set(known["0"].outputs)) == 3


NORMS = {
    "batch": nn.BatchNorm2d(4),
    "batch in evaluation": nn.BatchNorm2d(4).eval(),
    "batch without scale": nn.BatchNorm2d(4, affine=False),
    "group": nn.GroupNorm(2, 4),
    "instance": nn.InstanceNorm2d(4, affine=True),
    "instance without scale": nn.InstanceNorm2d(4),
    "local response": nn.LocalResponseNorm(2),
}


@pytest.mark.parametrize("name", NORMS)
def test_normalized_channels_stay_the_same(name: str) -> None:
    known = wiring_of(nn.Sequential(nn.Conv2d(2, 4, 1), NORMS[name], nn.Conv2d(4, 2, 1)), torch.randn(5, 2, 3, 3))
    assert places(known, "2", "0") == [0, 1, 2, 3]
    if "1" in known:
        assert known["1"].inputs == known["1"].outputs == known["2"].inputs


def test_a_normalization_of_several_axes_hands_on_the_last() -> None:
    known = wiring_of(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm((2, 4)), nn.Linear(4, 2)), torch.randn(5, 2, 3))
    assert places(known, "2", "0") == [0, 1, 2, 3]


def test_a_normalization_of_an_axis_without_neurons_leaves_the_neurons_unknown() -> None:
    known = wiring_of(nn.Sequential(nn.Conv2d(2, 3, 1), nn.LayerNorm(3), nn.Conv2d(3, 2, 1)), torch.randn(5, 2, 3, 3))
    assert_strangers(known, "1", "0")
    assert_strangers(known, "2", "0")


def test_a_layer_of_positions_is_no_reader_of_channels() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.Linear(3, 3), nn.Conv1d(3, 2, 1))
    known = wiring_of(model, torch.randn(5, 2, 3))
    assert_strangers(known, "1", "0")
    assert_strangers(known, "2", "1")


def test_embedded_tokens_are_neurons_that_the_next_layer_reads() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Tanh(), nn.Linear(4, 2))
    known = wiring_of(model, torch.randint(0, 9, (5, 3)))
    assert known["0"].inputs is None and places(known, "2", "0") == [0, 1, 2, 3]
    known = wiring_of(nn.Sequential(nn.EmbeddingBag(9, 4), nn.Linear(4, 2)), torch.randint(0, 9, (5, 3)))
    assert places(known, "1", "0") == [0, 1, 2, 3]


def test_a_tied_embedding_is_known_as_both() -> None:
    known = wiring_of(TiedEmbedding(), torch.randint(0, 9, (8, 3)))
    assert places(known, "last", "table") == [0, 1, 2, 3] and len(set(known["last"].outputs)) == 9


# ---------------------------------------------------------------------- attention


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention written out."""
    scores = (q @ k.transpose(-2, -1) / 2).masked_fill(torch.ones(3, 3, dtype=torch.bool).triu(1), -torch.inf)
    return functional.dropout(scores.softmax(-1), 0.1) @ v


def by_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention by Einstein's notation."""
    return torch.einsum("bhts,bhsd->bhtd", torch.einsum("bhtd,bhsd->bhts", q, k).softmax(-1), v)


def with_options(**options: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return torch's attention with some options."""
    return lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, **options)


ATTENTIONS = {
    "torch's": with_options(),
    "causal": with_options(is_causal=True),
    "masked": with_options(attn_mask=torch.ones(3, 3, dtype=torch.bool)),
    "with dropout": with_options(dropout_p=0.1),
    "written out": by_hand,
    "by Einstein's notation": by_sums,
}


class Attention(nn.Module):
    """Attention of four heads of two neurons, with as many or fewer heads of values."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], values: int = 4) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 8), nn.Linear(6, 2 * values), nn.Linear(6, 2 * values)
        self.attend, self.o = attend, nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs (b, 3, 6)."""
        q, k, v = (layer(x).unflatten(-1, (-1, 2)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(self.attend(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_after_attention_the_neurons_are_those_of_the_values(name: str) -> None:
    known = wiring_of(Attention(ATTENTIONS[name]), torch.randn(5, 3, 6))
    assert places(known, "o", "v") == list(range(8))
    assert known["q"].inputs == known["k"].inputs == known["v"].inputs
    assert_strangers(known, "o", "q")
    assert_strangers(known, "o", "k")


def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention of repeated heads, as transformers write it."""
    k, v = (each[:, :, None].expand(-1, -1, 2, -1, -1).reshape(len(each), 4, 3, 2) for each in (k, v))
    return functional.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("attend", [with_options(enable_gqa=True), repeated])
def test_heads_that_share_values_read_the_same_neurons(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    known = wiring_of(Attention(attend, values=2), torch.randn(5, 3, 6))
    assert places(known, "o", "v") == [0, 1, 0, 1, 2, 3, 2, 3]


def test_queries_keys_and_values_of_one_layer_are_told_apart() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.o = nn.Linear(6, 18), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).view(5, 3, 3, 2, 3).permute(2, 0, 3, 1, 4)
            return self.o(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(5, 3, 6))

    known = wiring_of(Fused(), torch.randn(5, 3, 6))
    assert places(known, "o", "qkv") == list(range(12, 18)) and len(set(known["qkv"].outputs)) == 18


def test_around_attention_as_a_function_the_stream_goes_on() -> None:
    model = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, norm_first=True)
    known = wiring_of(model, torch.randn(5, 3, 4))
    assert known["linear1"].outputs == known["linear2"].inputs
    assert known["norm1"].outputs == known["norm2"].inputs == known["linear1"].inputs == known["linear2"].outputs
    assert known["linear2"].is_model_output and not known["linear1"].is_model_output


STREAMS: dict[str, tuple[nn.Module, Tensor, dict[str, str]]] = {
    "MLP with skip connections": (
        models.SkipMLP(),
        torch.randn(4, 5),
        {"writers": "first down back", "readers": "up norm gated head"},
    ),
    "language model": (
        models.GPT(blocks=1),
        torch.randint(0, models.VOCABULARY, (4, 6)),
        {
            "writers": "tokens positions blocks.0.attention.o blocks.0.down",
            "readers": "blocks.0.norm1 blocks.0.attention.q blocks.0.attention.v blocks.0.norm2 blocks.0.up norm head",
        },
    ),
    "vision model with a class token": (
        models.ViT(class_token=True),
        torch.randn(4, 1, 4, 4),
        {"writers": "patches block.attention.o block.down", "readers": "block.norm1 block.attention.k block.up head"},
    ),
    "vision model without": (
        models.ViT(class_token=False),
        torch.randn(4, 1, 4, 4),
        {"writers": "patches block.attention.o block.down", "readers": "block.norm1 block.attention.k block.up head"},
    ),
    "convolutions with a skip connection": (
        models.ResNet(),
        torch.randn(4, 2, 6, 6),
        {"writers": "conv2 norm2 skip norm3", "readers": "norm2 norm3 head"},
    ),
    "transposed convolution": (
        models.Upsampling(),
        torch.randn(4, 2, 4, 4),
        {"writers": "side", "readers": "out"},
    ),
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_runs_through_a_whole_model(name: str) -> None:
    model, given, ports = STREAMS[name]
    known = wiring_of(model, given)
    written = {known[layer].outputs for layer in ports["writers"].split()}
    read = {known[layer].inputs for layer in ports["readers"].split()}
    assert len(written) == 1 and written == read
    assert len(set(*written)) == len(*written)


# ---------------------------------------------------------------------- the model's input and output


def test_views_of_the_input_are_recognised() -> None:
    known = wiring_of(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.randn(5, 3, 4))
    assert known["1"].reads_model_input


def test_an_overwritten_input_is_no_longer_the_input() -> None:
    class Overwriting(Pair):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2))

    assert not wiring_of(Overwriting(torch.relu))["first"].reads_model_input


def test_inputs_that_need_gradients_and_keyword_inputs_are_recognised() -> None:
    class Keyword(Pair):
        def forward(self, *, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"y": super().forward(batch["x"])}

    with GradientCapture(model := Keyword(torch.tanh)) as capture:
        model(batch={"x": torch.randn(5, 3, requires_grad=True)})
    assert capture.wiring()["first"].reads_model_input and capture.wiring()["second"].is_model_output


def test_outputs_are_found_behind_elementwise_operations_and_in_tuples() -> None:
    class TwoOutputs(Pair):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.first(x)
            return h, self.second(h.relu()).sigmoid()

    known = wiring_of(TwoOutputs(nn.Identity()))
    assert known["first"].is_model_output and known["second"].is_model_output
    assert places(known, "second", "first") == [0, 1, 2, 3]


def test_a_layer_of_whose_neurons_some_are_returned_is_no_output() -> None:
    class Part(Pair):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, :3]

    assert not wiring_of(Part(torch.relu))["second"].is_model_output


def test_a_bare_layer_is_input_and_output() -> None:
    (known,) = wiring_of(nn.Linear(3, 2)).values()
    assert known.reads_model_input and known.is_model_output
    assert len({*known.inputs, *known.outputs}) == 5


# ---------------------------------------------------------------------- which passes are traced


class Switching(nn.Module):
    """Takes another way when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head, self.through_a = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 1), True

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs (b, 1)."""
        return self.head((self.a if self.through_a else self.b)(x).relu())


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count the traced passes."""
    traced: list[int] = []

    class Counted(wiring.TracedPass):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            traced.append(1)

    with monkeypatch.context() as patch:
        patch.setattr(wiring, "TracedPass", Counted)
        yield traced


def test_what_several_passes_prove_is_put_together() -> None:
    model = Switching()
    with GradientCapture(model) as capture:
        model(torch.randn(5, 3))
        assert places(capture.wiring(), "head", "a") == [0, 1, 2, 3] and "b" not in capture.wiring()
        model.through_a = False
        model(torch.randn(5, 3))  # calls a layer of which nothing is known
        model(torch.randn(5, 3))
        known = capture.wiring()
        assert known["head"].inputs == known["a"].outputs == known["b"].outputs
        capture.clear()
        assert capture.wiring() == known


def test_one_pass_is_traced_and_another_for_a_layer_of_which_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Switching()
    with counted(monkeypatch) as traced, GradientCapture(model) as capture:
        for _ in range(3):
            model(torch.randn(5, 3))
        known = capture.wiring()
        assert len(traced) == 1
        model(torch.randn(5, 3))
        assert capture.wiring() is known
        model.through_a = False
        for _ in range(3):
            model(torch.randn(5, 3))
        assert len(traced) == 2 and capture.wiring() is not known


def test_a_layer_that_is_added_is_known_after_its_first_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with counted(monkeypatch) as traced, GradientCapture(model) as capture:
        model(torch.randn(5, 3))
        model.append(nn.Linear(2, 2))
        capture.attach()
        model(torch.randn(5, 3))
        assert capture.wiring()["2"].outputs == capture.wiring()["3"].inputs
        capture.attach()
        model(torch.randn(5, 3))
        assert len(traced) == 2


def test_a_model_that_keeps_changing_is_traced_no_more_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wiring, "MOST_TRACED_PASSES", 3)
    model = nn.ModuleList(nn.Linear(3, 3) for _ in range(20))
    ways = iter(model)
    model.forward = lambda x: next(ways)(x)
    with counted(monkeypatch) as traced, GradientCapture(model):
        for _ in range(20):
            nn.Module.__call__(model, torch.randn(5, 3))
        assert len(traced) == 3


def test_nothing_is_learned_without_gradients_or_while_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Pair(nn.Identity())
    with counted(monkeypatch) as traced, GradientCapture(model) as capture:
        with torch.no_grad():
            model(torch.randn(5, 3))
        with capture.paused():
            model(torch.randn(5, 3))
        assert capture.wiring() == {} and not traced


def test_nothing_is_proven_of_what_comes_from_an_earlier_pass() -> None:
    class Carrying(Pair):
        def forward(self, x: Tensor) -> Tensor:
            previous, self.state = getattr(self, "state", None), self.first(x)
            return self.second(self.state[:0] if previous is None else previous)

    model = Carrying(nn.Identity())
    with GradientCapture(model) as capture:
        model(torch.randn(5, 3))
        capture._recorder.wiring.trace_again()
        model(torch.randn(5, 3))
    assert_strangers(capture.wiring(), "second", "first")


def test_layers_that_are_called_outside_of_the_model_are_not_known() -> None:
    model = Pair(torch.relu)
    with GradientCapture(model) as capture:
        model.second(model.first(torch.randn(5, 3)))
        assert capture.wiring() == {}
        model(torch.randn(5, 3))
        assert places(capture.wiring(), "second", "first") == [0, 1, 2, 3]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_are_known_where_they_run_with_gradients(reentrant: bool) -> None:
    class Checkpointed(Pair):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(checkpoint(self.first, x, use_reentrant=reentrant).relu())

    model = Checkpointed(nn.Identity())
    with GradientCapture(model) as capture:
        model(torch.randn(5, 3, requires_grad=True)).sum().backward()
    assert capture.wiring()["second"].is_model_output and ("first" in capture.wiring()) != reentrant


def test_autocast_changes_nothing() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        known = wiring_of(Residual())
    assert known["first"].outputs == known["second"].outputs == known["third"].inputs


UNUSUAL: dict[str, Callable[[Tensor], Tensor]] = {
    "nested": lambda h: torch.nested.nested_tensor([h[:2], h[2:]]).to_padded_tensor(0.0).flatten(0, 1)[:5],
    "sparse": lambda h: torch.sparse.mm(torch.eye(5).to_sparse(), h),
    "complex": lambda h: torch.complex(h, h).abs(),
    "empty": lambda h: torch.cat([h, h[:0]]),
    "of integers": lambda h: h + h.long(),
    "quantized": lambda h: torch.quantize_per_tensor(h.detach(), 0.1, 0, torch.qint8).dequantize() + h,
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.filterwarnings("ignore:.*quantiz.*deprecated")
@pytest.mark.parametrize("name", UNUSUAL)
def test_tensors_of_unusual_kinds_pass(name: str) -> None:
    assert wiring_of(Pair(UNUSUAL[name]))["second"].is_model_output and is_clean()


# ---------------------------------------------------------------------- tracing leaves no mark


def is_clean() -> bool:
    """Whether torch is in no mode."""
    return torch._C._len_torch_dispatch_stack() == 0 and not _python_dispatch.is_in_torch_dispatch_mode()


def test_a_traced_pass_computes_what_an_ordinary_one_does() -> None:
    results = []
    for is_traced in (True, False):
        torch.manual_seed(0)
        model, x = (
            nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 2)),
            torch.randn(5, 3),
        )
        with GradientCapture(model) as capture:
            capture.enabled = is_traced
            output = model(x)
        output.square().sum().backward()
        results.append([output, torch.rand(()), *model.state_dict().values(), *(p.grad for p in model.parameters())])
    assert all(map(torch.equal, *results))


def test_after_a_pass_torch_is_in_no_mode() -> None:
    model = Pair(torch.relu)
    with GradientCapture(model) as capture:
        model(torch.randn(5, 3))
        assert is_clean() and len(capture.wiring()) == 2


def test_several_captures_leave_torch_in_no_mode() -> None:
    model = Pair(torch.relu)
    with GradientCapture(model) as one, GradientCapture(model) as other, GradientCapture(model.second):
        model(torch.randn(5, 3))
        assert is_clean() and one.wiring() == other.wiring() and len(one.wiring()) == 2


def test_a_pass_that_fails_leaves_torch_in_no_mode_and_proves_nothing() -> None:
    model = Pair(torch.relu)
    with GradientCapture(model) as one, GradientCapture(model):
        with pytest.raises(RuntimeError):
            model(torch.randn(5, 7))
        assert is_clean() and one.wiring() == {}


@pytest.mark.parametrize("end", ["close", "clear"])
def test_a_pass_that_is_interrupted_ends_with_the_capture(end: str) -> None:
    def interrupt(h: Tensor) -> Tensor:
        raise KeyboardInterrupt

    model = Pair(interrupt)
    capture = GradientCapture(model)
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(5, 3))
    getattr(capture, end)()
    assert is_clean()


def test_a_traced_pass_keeps_no_tensor_alive() -> None:
    seen = []

    @torch.no_grad()
    def between(h: Tensor) -> Tensor:
        inner = h * 2
        gone = weakref.ref(inner.untyped_storage())
        outer = inner + 1
        del inner
        seen.append(gone())
        return outer

    assert places(wiring_of(Pair(between)), "second", "first") == [0, 1, 2, 3] and seen == [None]


def test_a_new_tensor_in_the_memory_of_an_old_one_has_not_its_names() -> None:
    @torch.no_grad()
    def between(h: Tensor) -> Tensor:
        for _ in range(100):
            known = h * 2
            del known
            fresh.append(torch.ones(5, 4))
        return fresh[-1]

    fresh: list[Tensor] = []
    assert_strangers(wiring_of(Pair(between)), "second", "first")


def test_modes_of_the_user_see_every_operation() -> None:
    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []

    def inside(h: Tensor) -> Tensor:
        with Seeing():
            return h.relu()

    model = Pair(inside)
    with GradientCapture(model) as capture, Seeing():
        model(torch.randn(5, 3))
    assert places(capture.wiring(), "second", "first") == [0, 1, 2, 3] and is_clean()
    assert seen.count("aten.relu.default") == 2 and "aten.addmm.default" in seen


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_parts_of_a_model_are_compiled_in_a_traced_pass() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    known = wiring_of(Pair(torch.compile(lambda h: h.relu() + 1, backend=backend, fullgraph=True)))
    assert len(graphs) == 1 and set(known) == {"first", "second"} and is_clean()
