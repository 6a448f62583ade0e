"""What tests of the optimizer run on: models, batches and update rules by name, and the few verbs they share."""

import io
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gmn_optim import GMNOptimizer
from gmn_optim.neurons import LayerSpec, LayerWiring
from gmn_optim.rule import UpdateRule
from tests import models
from tests.tables import ARMS as ARMS
from tests.tables import DATA_POINTS as DATA_POINTS
from tests.tables import Conv1D

LEARNED = [name for name, config in ARMS.items() if config.body is not None]
"""Arms with a learned term."""

SOME = ["adam", "momentum+ds", "slots", "moments"]
"""One arm of each kind, for tests that have much else to vary."""

IN_EIGENBASIS = [name for name, config in ARMS.items() if config.in_eigenbasis]
"""Arms whose learned term serves matrices alone, in the bases of the nominal term."""

WITH_FACTORS = [name for name, config in ARMS.items() if config.gradmetanet is not None]
"""Arms that read each data point's factors."""


def make_rule(arm: str, seed: int = 0) -> UpdateRule:
    """Return a rule whose meta-parameters are all random and not zero, the zero-initialised ones included."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rule = UpdateRule(ARMS[arm]).requires_grad_(False)
        for name, parameter in rule.named_parameters():
            if name.endswith(".raw") or name.startswith("schedule"):
                parameter.normal_(std=0.01)  # these enter an exponential, ten times as large
            elif name.startswith(("body.output", "body.linear")):
                parameter.normal_(std=0.3)
    return rule


def without_learned_term(rule: UpdateRule) -> UpdateRule:
    """Return the rule with the last layer of its body set to zero."""
    twin = UpdateRule(rule.config).requires_grad_(False)
    twin.load_state_dict(rule.state_dict())
    silence(twin)
    return twin


def silence(rule: UpdateRule) -> UpdateRule:
    """Set everything that a body writes to zero, in place."""
    for name, parameter in rule.body.named_parameters():
        if name.startswith(("output", "linear")):
            parameter.zero_()
    return rule


class FunctionalMLP(nn.Module):
    """Three layers whose activations are functions, not modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return outputs (b, 3)."""
        hidden = nn.functional.relu(self.first(inputs))
        return self.third(torch.tanh(self.second(hidden)))


class ReusedLayer(nn.Module):
    """One layer that is applied three times."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return outputs (b, 3)."""
        for _ in range(3):
            inputs = torch.tanh(self.inner(inputs))
        return self.last(inputs)


class TiedLayers(nn.Module):
    """Two layers with one weight and biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.second.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        """Return outputs (b, 3)."""
        return self.last(torch.relu(self.second(torch.relu(self.first(inputs)))))


class TiedEmbedding(nn.Module):
    """An embedding whose table is the weight of the last layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.last.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return outputs (b, 9)."""
        return self.last(self.table(tokens).mean(1))


class MixedKinds(nn.Module):
    """Two layers with one weight that lies otherwise in each, and another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 5), Conv1D(5, 5), nn.Linear(5, 3)
        self.second.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        """Return outputs (b, 3)."""
        return self.last(torch.relu(self.second(torch.relu(self.first(inputs)))))


class Attention(nn.Module):
    """Self-attention, whose weights are used as functions, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return outputs (b, p, 3)."""
        return self.last(self.attention(inputs, inputs, inputs, need_weights=False)[0])


class Penalized(nn.Module):
    """Two layers, the weight of the last of which is used element by element too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return outputs (b, 3)."""
        return self.last(torch.tanh(self.first(inputs))) + self.last.weight.square().mean()


class LooseParameters(nn.Module):
    """A layer and parameters of unusual shapes: no axis, no element, not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.slanted = nn.Parameter(torch.randn(3, 2).mT)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return outputs (b, 2)."""
        return self.layer(inputs) @ self.slanted.mT * self.scale + self.empty.sum()


def mlp() -> nn.Sequential:
    """Return three layers with ReLU between."""
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3))


class ModelCase(NamedTuple):
    """A model and what it is trained on.

    Attributes:
        model: Makes the model.
        inputs: Makes a batch.
        learned: Names of the parameters that the learned term serves.
    """

    model: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    learned: tuple[str, ...]


def _names(*layers: str) -> tuple[str, ...]:
    """Return the names of the weights and biases of layers."""
    return tuple(f"{layer}.{role}" for layer in layers for role in ("weight", "bias"))


def _all_but(model: nn.Module, *left_out: str) -> tuple[str, ...]:
    """Return the names of the parameters of a model without some."""
    assert set(left_out) <= {name for name, _ in model.named_parameters()}
    return tuple(name for name, _ in model.named_parameters() if name not in left_out)


def _vectors() -> Tensor:
    return torch.randn(8, 5)


def _sequences() -> Tensor:
    return torch.randn(8, 3, 4)


def _images() -> Tensor:
    return torch.randn(8, 1, 4, 4)


def _tokens() -> Tensor:
    return torch.randint(0, 9, (8, 3))


def _texts() -> Tensor:
    return torch.randint(0, models.VOCABULARY, (4, models.TOKENS))


def _pictures() -> Tensor:
    return torch.randn(6, 2, 6, 6)


MODELS: dict[str, ModelCase] = {
    "relu": ModelCase(mlp, _vectors, _names("0", "2", "4")),
    "tanh": ModelCase(
        lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)),
        _vectors,
        _names("0", "2", "4"),
    ),
    "in place": ModelCase(
        lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(True), nn.Linear(7, 6), nn.SiLU(True), nn.Linear(6, 3)),
        _vectors,
        _names("0", "2", "4"),
    ),
    "functional": ModelCase(FunctionalMLP, _vectors, _names("first", "second", "third")),
    "no biases": ModelCase(
        lambda: nn.Sequential(nn.Linear(5, 7, bias=False), nn.ReLU(), nn.Linear(7, 3, bias=False)),
        _vectors,
        ("0.weight", "2.weight"),
    ),
    "dropout": ModelCase(
        lambda: nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.2), nn.ReLU(), nn.Linear(7, 3)), _vectors, _names("0", "3")
    ),
    "sequences": ModelCase(
        lambda: nn.Sequential(nn.Linear(4, 7), nn.GELU(), nn.Linear(7, 3)), _sequences, _names("0", "2")
    ),
    "layer norm": ModelCase(
        lambda: nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)),
        _vectors,
        _names("0", "1", "2"),
    ),
    "batch norm": ModelCase(
        lambda: nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)),
        _vectors,
        ("0.weight", *_names("1", "2")),  # the bias before the normalization has no gradient
    ),
    "convolution": ModelCase(
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)),
        _images,
        _names("0", "3"),
    ),
    "embedding": ModelCase(
        lambda: nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3)),
        _tokens,
        ("0.weight", *_names("2")),
    ),
    "reused": ModelCase(ReusedLayer, _vectors, _names("inner", "last")),
    "tied": ModelCase(TiedLayers, _vectors, ("first.weight", *_names("last"))),
    "attention": ModelCase(
        Attention,
        _sequences,
        ("attention.in_proj_weight", "attention.in_proj_bias", *_names("attention.out_proj", "last")),
    ),
    "mixed kinds": ModelCase(MixedKinds, _vectors, _names("last")),
    "tied embedding": ModelCase(TiedEmbedding, _tokens, ("table.weight",)),
    "loose": ModelCase(LooseParameters, _vectors, _names("layer")),
    "bags": ModelCase(
        lambda: nn.Sequential(nn.EmbeddingBag(9, 4), nn.RMSNorm(4), nn.Linear(4, 3)),
        _tokens,
        ("0.weight", "1.weight", *_names("2")),
    ),
    "inputs first": ModelCase(lambda: nn.Sequential(Conv1D(7, 5), nn.GELU(), Conv1D(3, 7)), _vectors, _names("0", "2")),
    "groups": ModelCase(
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 2),
            nn.GroupNorm(2, 4),
            nn.Tanh(),
            nn.Conv2d(4, 4, 2, groups=2),
            nn.Flatten(),
            nn.Linear(16, 3),
        ),
        _images,
        _names("0", "1", "3", "5"),
    ),
    "instance norm": ModelCase(
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 2), nn.InstanceNorm2d(4, affine=True), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)
        ),
        _images,
        ("0.weight", *_names("1", "4")),
    ),
    "skip connections": ModelCase(models.SkipMLP, _vectors, _all_but(models.SkipMLP())),
    "language model": ModelCase(
        models.GPT, _texts, _all_but(models.GPT(), "blocks.0.attention.k.bias", "blocks.1.attention.k.bias")
    ),
    "tied language model": ModelCase(
        lambda: models.GPT(tied=True, blocks=1), _texts, _all_but(models.GPT(True, 1), "blocks.0.attention.k.bias")
    ),
    "vision model": ModelCase(
        lambda: models.ViT(class_token=True),
        _images,
        _all_but(models.ViT(True), "token", "positions", "block.attention.k.bias"),
    ),
    "residual convolutions": ModelCase(models.ResNet, _pictures, _all_but(models.ResNet(), "conv1.bias")),
    "upsampling": ModelCase(
        lambda: models.Upsampling(groups=2),
        lambda: torch.randn(6, 2, 4, 4),
        _all_but(models.Upsampling(2), "up.bias", "out.bias"),
    ),
}
"""Models that are captured without a warning."""

WARNING_MODELS: dict[str, ModelCase] = {
    "penalized": ModelCase(Penalized, _vectors, _names("first")),
}
"""Models one of whose layers cannot be explained by its factors, which is said once."""


def make_case(case: ModelCase, steps: int, seed: int = 0) -> tuple[nn.Module, list[Tensor]]:
    """Return a seeded model and batches."""
    torch.manual_seed(seed)
    return case.model(), [case.inputs() for _ in range(steps)]


def loss_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return a mean loss () that no parameter is optimal for."""
    outputs = model(inputs)
    targets = torch.linspace(-1.0, 1.0, outputs.shape[-1], dtype=outputs.dtype)
    return (outputs - targets).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[Tensor], scale: float = 1.0) -> float:
    """Train on each batch once; return the last loss."""
    for inputs in batches:
        optimizer.zero_grad()
        loss = loss_of(model, inputs) * scale
        loss.backward()
        optimizer.step()
    return loss.item()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(model: nn.Module, other: nn.Module | dict[str, Tensor], **tolerance: float) -> None:
    """Require equal parameters, bit by bit if no tolerance is given."""
    wanted = other if isinstance(other, dict) else snapshot(other)
    torch.testing.assert_close(snapshot(model), wanted, **(tolerance or {"rtol": 0, "atol": 0}), equal_nan=False)


def assert_equal_states(state: Any, other: Any) -> None:
    """Require equal state dicts, bit by bit."""
    assert state["param_groups"] == other["param_groups"]
    torch.testing.assert_close(state["state"], other["state"], rtol=0, atol=0, equal_nan=False)


def distance(model: nn.Module, other: nn.Module | dict[str, Tensor]) -> float:
    """Return the largest difference between two models' parameters."""
    wanted = other if isinstance(other, dict) else snapshot(other)
    return max((value - wanted[name]).abs().max().item() for name, value in snapshot(model).items() if value.numel())


def count_hooks(model: nn.Module) -> int:
    """Return the number of forward hooks of all kinds on a model."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def saved_and_loaded(state: Any) -> Any:
    """Return what ``torch.load`` makes of a saved state without executing anything in it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def optimizer_for(model: nn.Module, arm: str, **options: Any) -> GMNOptimizer:
    """Return an optimizer with the random rule of an arm."""
    return GMNOptimizer(model, weights=make_rule(arm), **options)


def random_wiring(seed: int) -> tuple[dict[str, LayerSpec], dict[str, LayerWiring]]:
    """Return random layers of all kinds that read and write random ones of few neurons."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    def names(width: int) -> tuple[int, ...]:
        start = draw(12)
        return tuple(start + number for number in range(width)) if draw(2) else tuple(draw(16) for _ in range(width))

    specs, wiring = {}, {}
    for number in range(2 + draw(5)):
        inputs, outputs = 1 + draw(4), 1 + draw(4)
        kind = ("matrix", "matrix", "diagonal", "table")[draw(4)]
        if kind == "diagonal":
            specs[str(number)], read = LayerSpec(inputs, inputs, structure=kind), names(inputs)
            wiring[str(number)] = LayerWiring(read, read)
        else:
            specs[str(number)] = LayerSpec(1 if kind == "table" else inputs, outputs, structure=kind)
            read = None if kind == "table" else names(inputs)
            wiring[str(number)] = LayerWiring(read, names(outputs))
    return specs, wiring
