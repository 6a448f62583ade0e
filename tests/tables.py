"""The members of every family, a row for each: tests that the whole family must pass run for every row.

``tests/test_tables.py`` names a member that has no row.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gmn_optim.neurons import NeuronSpaces
from gmn_optim.nn import (
    DeepSets,
    GradMetaNet,
    GradMetaNetConfig,
    InteractionsAcrossSets,
    NeuronEncoding,
    ProductLayer,
    SetPooling,
)
from gmn_optim.rule import RuleConfig
from gmn_optim.rule.nominal import nominal_terms
from gmn_optim.testing import Output
from tests.reference import ScheduleFree

try:
    from transformers.pytorch_utils import Conv1D
except ImportError:

    class Conv1D(nn.Module):
        """What transformers calls so: a linear layer whose weight lies as (i, o). Adapters know it by its full name."""

        __module__ = "transformers.pytorch_utils"

        def __init__(self, nf: int, nx: int) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.empty(nx, nf).normal_(std=0.02)), nn.Parameter(torch.zeros(nf))

        def forward(self, x: Tensor) -> Tensor:
            """Return outputs (..., nf)."""
            rows = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
            return rows.view(*x.shape[:-1], -1)

    Conv1D.__qualname__ = "Conv1D"


def rms_norm_class(model: str, name: str) -> type[nn.Module]:
    """Return a stand-in for the RMS norm that transformers has for a model; adapters know it by its full name."""

    def __init__(self: nn.Module, width: int) -> None:
        nn.Module.__init__(self)
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    place = f"transformers.models.{model}.modeling_{model}"
    return type(name, (nn.Module,), {"__init__": __init__, "forward": forward, "__module__": place})


RMS_NORMS = {
    model: rms_norm_class(model, name)
    for model, name in {
        "llama": "LlamaRMSNorm",
        "mistral": "MistralRMSNorm",
        "mixtral": "MixtralRMSNorm",
        "phi3": "Phi3RMSNorm",
        "qwen2": "Qwen2RMSNorm",
        "qwen3": "Qwen3RMSNorm",
        "mamba": "MambaRMSNorm",
        "t5": "T5LayerNorm",
    }.items()
}

Shape = tuple[int, ...]


class LayerCase(NamedTuple):
    """A layer kind that an adapter serves, see tests/capture/test_layer_kinds.py.

    Attributes:
        variants: What makes a layer, by what is special about it.
        shapes: Of inputs, data points first where there are any, as in the first; every variant takes each of them.
        draw: Makes an input of a shape.
    """

    variants: Mapping[str, Callable[[], nn.Module]]
    shapes: Sequence[Shape]
    draw: Callable[[Shape], Tensor] = lambda shape: torch.randn(shape, dtype=torch.float64)


def evaluated(norm: nn.Module) -> nn.Module:
    """Return a normalization in evaluation, with running statistics of its own."""
    for statistics in (norm.running_mean, norm.running_var):
        statistics.copy_(torch.linspace(0.5, 2.0, len(statistics)))
    return norm.eval()


def _tokens(shape: Shape) -> Tensor:
    """Return numbers of rows of a table of nine."""
    return torch.randint(0, 9, shape)


def _batch_norms(kind: type[nn.Module]) -> dict[str, Callable[[], nn.Module]]:
    """Return what may be special about a batch normalization of four channels."""
    return {
        "in training": lambda: kind(4),
        "in evaluation": lambda: evaluated(kind(4)),
        "cumulative": lambda: kind(4, momentum=None),
        "without running statistics": lambda: kind(4, track_running_stats=False),
        "without running statistics in evaluation": lambda: kind(4, track_running_stats=False).eval(),
    }


LAYERS: dict[type[nn.Module], LayerCase] = {
    nn.Linear: LayerCase(
        {"with bias": lambda: nn.Linear(3, 2), "without bias": lambda: nn.Linear(3, 2, bias=False)},
        [(5, 2, 3), (5, 3), (1, 3), (3,), (5, 2, 4, 3)],
    ),
    Conv1D: LayerCase({"inputs first": lambda: Conv1D(2, 3)}, [(5, 2, 3), (5, 3), (3,), (5, 2, 4, 3)]),
    **{kind: LayerCase({"plain": lambda kind=kind: kind(4)}, [(5, 3, 4), (5, 4), (4,)]) for kind in RMS_NORMS.values()},
    nn.Conv1d: LayerCase(
        {
            "plain": lambda: nn.Conv1d(4, 6, 3),
            "without bias": lambda: nn.Conv1d(4, 6, 3, bias=False),
            "one tap": lambda: nn.Conv1d(4, 6, 1),
            "stride": lambda: nn.Conv1d(4, 6, 3, stride=2),
            "stride beyond the kernel": lambda: nn.Conv1d(4, 6, 2, stride=3),
            "padding": lambda: nn.Conv1d(4, 6, 3, padding=2),
            "dilation": lambda: nn.Conv1d(4, 6, 3, dilation=2),
            "groups": lambda: nn.Conv1d(4, 6, 3, groups=2),
            "depthwise": lambda: nn.Conv1d(4, 8, 3, groups=4),
            "same": lambda: nn.Conv1d(4, 6, 3, padding="same"),
            "same with an even kernel": lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=1),
            "valid": lambda: nn.Conv1d(4, 6, 3, padding="valid"),
            "reflect": lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="reflect"),
            "replicate": lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="replicate"),
            "circular": lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"),
            "all at once": lambda: nn.Conv1d(
                4, 6, 3, stride=2, padding=3, dilation=2, groups=2, padding_mode="circular", bias=False
            ),
        },
        [(5, 4, 9), (1, 4, 9), (4, 9)],
    ),
    nn.Conv2d: LayerCase(
        {
            "plain": lambda: nn.Conv2d(4, 6, 3),
            "rectangular": lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
            "groups": lambda: nn.Conv2d(4, 6, (2, 3), groups=2, padding=1, padding_mode="reflect"),
            "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1, padding_mode="circular", bias=False),
            "same with an even kernel": lambda: nn.Conv2d(4, 6, (3, 2), padding="same"),
            "replicate": lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="replicate"),
            "patches": lambda: nn.Conv2d(4, 6, 3, stride=3),
        },
        [(3, 4, 7, 6), (4, 7, 6)],
    ),
    nn.Conv3d: LayerCase(
        {
            "plain": lambda: nn.Conv3d(2, 3, 2),
            "all at once": lambda: nn.Conv3d(
                2, 4, (2, 3, 1), stride=(1, 2, 1), padding=(1, 2, 0), dilation=(2, 1, 1), groups=2
            ),
            "circular": lambda: nn.Conv3d(2, 3, 3, padding=1, padding_mode="circular"),
        },
        [(3, 2, 4, 5, 3), (2, 4, 5, 3)],
    ),
    nn.ConvTranspose1d: LayerCase(
        {
            "plain": lambda: nn.ConvTranspose1d(4, 6, 3),
            "without bias": lambda: nn.ConvTranspose1d(4, 6, 3, bias=False),
            "stride": lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1),
            "stride beyond the kernel": lambda: nn.ConvTranspose1d(4, 6, 2, stride=3, output_padding=2),
            "dilation": lambda: nn.ConvTranspose1d(4, 6, 3, dilation=2, padding=3),
            "output padding beyond the stride": lambda: nn.ConvTranspose1d(
                4, 6, 3, stride=2, dilation=3, output_padding=2
            ),
            "groups": lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2),
            "depthwise": lambda: nn.ConvTranspose1d(4, 4, 3, groups=4),
        },
        [(5, 4, 5), (1, 4, 5), (4, 5)],
    ),
    nn.ConvTranspose2d: LayerCase(
        {
            "plain": lambda: nn.ConvTranspose2d(4, 6, 3),
            "rectangular": lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
            "groups": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2, output_padding=(1, 0)),
            "depthwise": lambda: nn.ConvTranspose2d(4, 8, 2, stride=2, groups=4),
        },
        [(3, 4, 3, 4), (4, 3, 4)],
    ),
    nn.ConvTranspose3d: LayerCase(
        {
            "plain": lambda: nn.ConvTranspose3d(2, 3, 2, stride=2),
            "groups": lambda: nn.ConvTranspose3d(2, 4, 2, stride=2, groups=2, output_padding=1, padding=1),
        },
        [(3, 2, 2, 2, 3), (2, 2, 2, 3)],
    ),
    nn.Embedding: LayerCase(
        {
            "plain": lambda: nn.Embedding(9, 4),
            "padding": lambda: nn.Embedding(9, 4, padding_idx=2),
            "bounded": lambda: nn.Embedding(9, 4, max_norm=1.0),
        },
        [(5, 6), (5,), (2, 3, 4), ()],
        _tokens,
    ),
    nn.EmbeddingBag: LayerCase(
        {
            "sum": lambda: nn.EmbeddingBag(9, 4, mode="sum"),
            "mean": lambda: nn.EmbeddingBag(9, 4, mode="mean"),
            "sum with padding": lambda: nn.EmbeddingBag(9, 4, mode="sum", padding_idx=2),
            "mean with padding": lambda: nn.EmbeddingBag(9, 4, mode="mean", padding_idx=2),
        },
        [(5, 6), (1, 3)],
        _tokens,
    ),
    nn.LayerNorm: LayerCase(
        {
            "last axis": lambda: nn.LayerNorm(4),
            "without bias": lambda: nn.LayerNorm(4, bias=False),
            "several axes": lambda: nn.LayerNorm((3, 4)),
        },
        [(5, 3, 4), (5, 2, 3, 4), (3, 4)],
    ),
    nn.RMSNorm: LayerCase(
        {"last axis": lambda: nn.RMSNorm(4), "several axes": lambda: nn.RMSNorm((3, 4), eps=0.1)},
        [(5, 3, 4), (5, 2, 3, 4), (3, 4)],
    ),
    nn.GroupNorm: LayerCase(
        {"two groups": lambda: nn.GroupNorm(2, 4), "one group": lambda: nn.GroupNorm(1, 4)},
        [(5, 4), (5, 4, 3), (5, 4, 3, 2)],
    ),
    nn.BatchNorm1d: LayerCase(_batch_norms(nn.BatchNorm1d), [(5, 4), (5, 4, 3)]),
    nn.BatchNorm2d: LayerCase(_batch_norms(nn.BatchNorm2d), [(5, 4, 3, 2)]),
    nn.BatchNorm3d: LayerCase(_batch_norms(nn.BatchNorm3d), [(3, 4, 3, 2, 2)]),
    nn.InstanceNorm1d: LayerCase({"scaled": lambda: nn.InstanceNorm1d(4, affine=True)}, [(5, 4, 7), (4, 7)]),
    nn.InstanceNorm2d: LayerCase({"scaled": lambda: nn.InstanceNorm2d(4, affine=True)}, [(5, 4, 3, 2), (4, 3, 2)]),
    nn.InstanceNorm3d: LayerCase(
        {"scaled": lambda: nn.InstanceNorm3d(4, affine=True)}, [(3, 4, 3, 2, 2), (4, 3, 2, 2)]
    ),
}


class ArchitectureCase(NamedTuple):
    """An equivariant module of ``gmn_optim.nn``, see tests/nn/test_architectures.py.

    Attributes:
        variants: What makes a module that reads two channels of every neuron, by what is special about it.
        apply: What the module makes of sets (b, n, 2), their neuron spaces, and features of neurons (n, 3).
        neuron_channels: 3 if it reads features of neurons, 0 if it does not.
    """

    variants: Mapping[str, Callable[[], nn.Module]]
    apply: Callable[[Any, Tensor, NeuronSpaces, Tensor | None], Output]
    neuron_channels: int = 0


ARCHITECTURES: dict[type[nn.Module], ArchitectureCase] = {
    InteractionsAcrossSets: ArchitectureCase(
        {"mean": lambda: InteractionsAcrossSets(2, 5), "sum": lambda: InteractionsAcrossSets(2, 5, "sum")},
        lambda layer, sets, spaces, neurons: layer(sets),
    ),
    SetPooling: ArchitectureCase(
        {"mean": lambda: SetPooling(2, 5), "sum": lambda: SetPooling(2, 5, "sum")},
        lambda layer, sets, spaces, neurons: layer(sets),
    ),
    DeepSets: ArchitectureCase(
        {"mean": lambda: DeepSets(2, 5), "sum": lambda: DeepSets(2, 5, "sum")},
        lambda layer, sets, spaces, neurons: layer(sets.mean(0)),
    ),
    ProductLayer: ArchitectureCase(
        {"plain": lambda: ProductLayer(2, 8, 3)}, lambda layer, sets, spaces, neurons: layer(sets.mean(0), spaces)
    ),
    NeuronEncoding: ArchitectureCase(  # alone it does not depend on its input, which would test nothing
        {"numbered": lambda: NeuronEncoding(4), "without numbers": lambda: NeuronEncoding(4, False)},
        lambda layer, sets, spaces, neurons: layer(spaces, sets.dtype) + sets.mean(0).sum(-1, keepdim=True),
    ),
    GradMetaNet: ArchitectureCase(
        {
            "usual": lambda: GradMetaNet(2, 3, GradMetaNetConfig(width=8, out_channels=5)),
            "deep": lambda: GradMetaNet(2, 3, GradMetaNetConfig(width=8, set_layers=3, neuron_layers=2)),
            "shallow": lambda: GradMetaNet(2, 3, GradMetaNetConfig(width=8, set_layers=1, neuron_layers=0)),
            "sum": lambda: GradMetaNet(2, 3, GradMetaNetConfig(width=8, reduction="sum")),
            "without numbers": lambda: GradMetaNet(2, 3, GradMetaNetConfig(width=8, neuron_numbers=False)),
        },
        lambda network, sets, spaces, neurons: network(sets, spaces, neurons),
        neuron_channels=3,
    ),
}


NOMINAL_TERMS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "momentum": lambda parameters, alpha, momentum=0.9: torch.optim.SGD(parameters, alpha * (1 - momentum), momentum),
    "adam": lambda parameters, alpha, momentum=0.9: torch.optim.Adam(parameters, alpha, (momentum, 0.999)),
    "kronecker_adam": lambda parameters, alpha, momentum=0.9: torch.optim.Adam(parameters, alpha, (momentum, 0.999)),
    "kronecker_schedule_free": lambda parameters, alpha, momentum=0.8: ScheduleFree(parameters, alpha, momentum),
}
"""For each nominal term the torch optimizer that takes the same steps on vectors, from parameters, alpha and the decay
of the average of gradients, see tests/rule/test_nominal.py."""

ELEMENTWISE_TERMS = [name for name in NOMINAL_TERMS if not nominal_terms[name].uses_factors]
"""Those that take the same steps on all parameters."""

DATA_POINTS = 6
"""Rows that GradMetaNet reads in every arm below."""

_NET = GradMetaNetConfig(width=8)
_MOMENTUM = dict(nominal="momentum", beta=0.1, width=8, depth=2, data_points=DATA_POINTS)
_KRONECKER = dict(nominal="kronecker_adam", beta=0.5, width=8, depth=2, data_points=DATA_POINTS)
_SCHEDULE_FREE = dict(nominal="kronecker_schedule_free", body="eigenbasis", width=8, data_points=DATA_POINTS)
_ADAM = dict(nominal="adam", beta=0.5, width=8, depth=2, data_points=DATA_POINTS)

ARMS: dict[str, RuleConfig] = {
    **{name: RuleConfig(nominal=name, body=None) for name in NOMINAL_TERMS},
    "momentum+ds": RuleConfig(**_MOMENTUM),
    "slots": RuleConfig(**_MOMENTUM, gradmetanet=_NET, memory="slots"),
    "moments": RuleConfig(**_ADAM, gradmetanet=_NET, memory="moments"),
    "gated": RuleConfig(**_ADAM, gradmetanet=_NET, memory="moments", gated=True),
    "kronecker_adam+gmn": RuleConfig(**_KRONECKER, gradmetanet=_NET, memory="slots"),
    "scheduled": RuleConfig(**_ADAM, gradmetanet=_NET, memory="slots", scheduled=True),
    "eigenbasis": RuleConfig(**_SCHEDULE_FREE),
    "eigenbasis+gmn": RuleConfig(**_SCHEDULE_FREE, gradmetanet=_NET),
    "controller": RuleConfig(nominal="kronecker_schedule_free", body="controller", width=8, data_points=DATA_POINTS),
}
"""Update rules: all tests of the rule, the optimizer and the unroll run for each. A body or a memory is a row here."""


class TaskCase(NamedTuple):
    """A task under its name, see tests/tasks/test_tasks.py.

    Attributes:
        parameters: Shapes of its parameters.
        batch: Shapes of what a batch consists of.
        lr: Step size by which forty steps of Adam lower the held-out loss.
    """

    parameters: Mapping[str, Shape]
    batch: Sequence[Shape]
    lr: float


def _linear(name: str, fan_in: int, fan_out: int, taps: Shape = ()) -> dict[str, Shape]:
    """Return the shapes of a linear layer, or of a convolution with a kernel of these taps."""
    return {f"{name}.weight": (fan_out, fan_in, *taps), f"{name}.bias": (fan_out,)}


def _mlp(*widths: int) -> dict[str, Shape]:
    """Return the shapes of an MLP with an activation after each layer but the last."""
    layers = [_linear(str(2 * i), *pair) for i, pair in enumerate(zip(widths[:-1], widths[1:], strict=True))]
    return {name: shape for layer in layers for name, shape in layer.items()}


def _cnn(*channels: int, spacing: int, head: Sequence[int]) -> dict[str, Shape]:
    """Return the shapes of 3 x 3 convolutions, ``spacing`` modules apart, and of a head: place, inputs, classes."""
    pairs = enumerate(zip(channels[:-1], channels[1:], strict=True))
    layers = [_linear(str(spacing * i), *pair, (3, 3)) for i, pair in pairs]
    layers.append(_linear(str(head[0]), *head[1:]))
    return {name: shape for layer in layers for name, shape in layer.items()}


def _transformer(symbols: int, width: int, blocks: int, context: int) -> dict[str, Shape]:
    """Return the shapes of a byte transformer."""
    shapes: dict[str, Shape] = {"symbol.weight": (symbols, width), "place.weight": (context, width)}
    for block in (f"blocks.{i}" for i in range(blocks)):
        for norm in ("attention_norm", "mlp_norm"):
            shapes |= {f"{block}.{norm}.{name}": (width,) for name in ("weight", "bias")}
        for layer in ("query", "key", "value", "output"):
            shapes |= _linear(f"{block}.attention.{layer}", width, width)
        shapes |= _linear(f"{block}.up", width, 4 * width) | _linear(f"{block}.down", 4 * width, width)
    return shapes | {"norm.weight": (width,), "norm.bias": (width,)} | _linear("head", width, symbols)


TASKS: dict[str, TaskCase] = {
    "fashion-mnist-mlp": TaskCase(_mlp(64, 32, 10), [(128, 64), (128,)], lr=0.01),
    "quadratic": TaskCase({"x": (2,)}, [(2,)], lr=0.03),
    "validation-fmnist14-mlp": TaskCase(_mlp(196, 100, 50, 25, 10), [(64, 196), (64,)], lr=0.01),
    "validation-fmnist12-deep-mlp": TaskCase(_mlp(144, *(20,) * 6, 10), [(128, 144), (128,)], lr=0.03),
    "validation-letters-mlp": TaskCase(_mlp(16, 96, 48, 26), [(100, 16), (100,)], lr=0.01),
    "validation-fmnist14-cnn": TaskCase(
        _cnn(1, 6, 12, spacing=3, head=(7, 108, 10)), [(50, 1, 14, 14), (50,)], lr=0.01
    ),
    "validation-fmnist14-autoencoder": TaskCase(_mlp(196, 80, 12, 80, 196), [(100, 196), (100, 196)], lr=0.01),
    "validation-fmnist12-inpainting": TaskCase(_mlp(72, 64, 64, 64, 72), [(50, 72), (50, 72)], lr=0.01),
    "validation-hubble-siren": TaskCase(_mlp(2, 48, 48, 3), [(200, 2), (200, 3)], lr=0.001),
    "validation-carroll-transformer": TaskCase(_transformer(49, 40, 1, 40), [(16, 40), (16, 40)], lr=0.01),
    "validation-carroll-windows-mlp": TaskCase(_mlp(392, 128, 49), [(100, 392), (100,)], lr=0.003),
    "validation-few-letters-mlp": TaskCase(_mlp(16, 64, 32, 26), [(64, 16), (64,)], lr=0.01),
    "validation-few-fmnist8-mlp": TaskCase(_mlp(64, 64, 32, 10), [(64, 64), (64,)], lr=0.01),
    "mnist-mlp-784-128": TaskCase(_mlp(784, 128, 10), [(128, 784), (128,)], lr=0.003),
    "mnist14-mlp-64-64-64-64": TaskCase(_mlp(196, 64, 64, 64, 64, 10), [(128, 196), (128,)], lr=0.01),
    "mnist8-mlp-32": TaskCase(_mlp(64, 32, 10), [(128, 64), (128,)], lr=0.01),
    "mnist-autoencoder": TaskCase(_mlp(784, 128, 32, 128, 784), [(128, 784), (128, 784)], lr=0.003),
    "fashion-mnist-mlp-784-256-128": TaskCase(_mlp(784, 256, 128, 10), [(128, 784), (128,)], lr=0.003),
    "fashion-mnist-cnn": TaskCase(_cnn(1, 16, 32, spacing=3, head=(7, 1568, 10)), [(64, 1, 28, 28), (64,)], lr=0.003),
    "cifar10-8x8-mlp": TaskCase(_mlp(192, 32, 10), [(128, 192), (128,)], lr=0.01),
    "cifar10-16x16-cnn": TaskCase(
        _cnn(3, 32, 64, 160, spacing=2, head=(8, 160, 10)), [(64, 3, 16, 16), (64,)], lr=0.003
    ),
    "cifar10-16x16-inpainting": TaskCase(_mlp(384, 128, 128, 384), [(128, 384), (128, 384)], lr=0.003),
    "digits-mlp": TaskCase(_mlp(64, 64, 32, 10), [(64, 64), (64,)], lr=0.01),
    "astronaut-siren": TaskCase(_mlp(2, 128, 128, 128, 3), [(256, 2), (256, 3)], lr=0.001),
    "milton-transformer": TaskCase(_transformer(49, 96, 2, 48), [(16, 48), (16, 48)], lr=0.003),
}


class EstimatorCase(NamedTuple):
    """An estimator of the meta-gradient under its name, see tests/metatrain/test_estimators.py.

    Attributes:
        replicates: Estimates that are averaged before they are compared with the exact meta-gradient.
        settings: Of the estimator.
        sees_whole_horizon: Whether it is unbiased for whole trainings; otherwise for each truncation by itself.
    """

    replicates: int
    settings: Mapping[str, Any]
    sees_whole_horizon: bool


ESTIMATORS: dict[str, EstimatorCase] = {
    "pes": EstimatorCase(50, {"unrolls": 256, "sigma": 1e-3}, sees_whole_horizon=True),
    "truncated-es": EstimatorCase(50, {"unrolls": 256, "sigma": 1e-3}, sees_whole_horizon=False),
    "backprop": EstimatorCase(2, {"unrolls": 2}, sees_whole_horizon=False),
}

WEIGHTS: dict[str, str] = {
    "family-default.controller": "kronecker_schedule_free+controller",
    "fashion-mnist-mlp.adam-gmn": "adam+ds+gmn",
    "fashion-mnist-mlp.momentum-ds": "momentum+ds",
    "fashion-mnist-mlp.momentum-gmn": "momentum+ds+gmn",
}
"""Arms of the weights that ship, by name, see tests/test_pretrained.py."""
