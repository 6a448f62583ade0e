"""What flows from layer to layer is claimed only where it is proven."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gmn_optim.capture import GradientCapture
from gmn_optim.capture.flow import LayerFlow

UNKNOWN = LayerFlow(None, False, False)


class Pair(nn.Module):
    """Two layers and what happens between them."""

    def __init__(self, between: Callable[[Tensor], Tensor] | nn.Module, width: int = 4) -> None:
        super().__init__()
        self.first, self.between, self.second = nn.Linear(3, width), between, nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


def flows_of(model: nn.Module, *inputs: Tensor, **options: Tensor) -> dict[str, LayerFlow]:
    """Return what one forward pass proves."""
    with GradientCapture(model) as capture:
        model(*(inputs or (torch.randn(5, 3),)), **options)
    return capture.flows()


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
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 3)])
def test_elementwise_operations_connect_layers(between: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
    if len(shape) == 3 and getattr(between, "num_parameters", 1) > 1:
        shape = (5, 4, 3)  # slopes per channel belong to axis 1
    model = Pair(between)
    if getattr(between, "inplace", False):
        model.first = nn.Linear(3, 4, bias=False)  # the view of a layer with bias has a test of its own
    flows = flows_of(model, torch.randn(shape))
    assert flows == {"first": LayerFlow(None, True, False), "second": LayerFlow("first", False, True)}


@pytest.mark.parametrize(
    "between",
    [
        nn.Softmax(-1), nn.LayerNorm(4), lambda h: h.flip(-1), lambda h: h @ torch.ones(4, 4), lambda h: h.t().t(),
        lambda h: h.view(-1).view(5, 4), lambda h: torch.cat([h[:, :2], h[:, 2:]], 1), lambda h: h.cumsum(-1),
        lambda h: h.detach(), lambda h: h + h.mean(), lambda h: h + h.mean(1, keepdim=True),
        lambda h: h[:, [1, 0, 2, 3]], lambda h: h * h.roll(1, -1),
    ],
    ids=str,
)  # fmt: skip
def test_all_else_connects_nothing(between: Callable[[Tensor], Tensor]) -> None:
    assert flows_of(Pair(between))["second"].source is None


@pytest.mark.parametrize(("shape", "source"), [((5, 3), "first"), ((5, 2, 3), None)])
def test_a_view_changed_in_place_hides_the_operation(shape: tuple[int, ...], source: str | None) -> None:
    """With a bias, ``nn.Linear`` returns a view for inputs with more than two axes; autograd names no operation."""
    assert flows_of(Pair(nn.ReLU(inplace=True)), torch.randn(shape))["second"].source == source


def test_a_slice_written_in_place_connects_nothing() -> None:
    def shuffle(h: Tensor) -> Tensor:
        h[:, :2] = h[:, 2:].clone()
        return h

    assert flows_of(Pair(shuffle))["second"].source is None


def test_a_broadcast_output_is_not_the_input() -> None:
    class Broadcast(Pair):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x) * torch.ones(4))

    model = Broadcast(nn.Identity())
    model.first = nn.Linear(3, 1)
    assert flows_of(model)["second"].source is None


class Residual(nn.Module):
    """A residual sum of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.third(h + self.second(h.relu()))


def test_a_residual_sum_connects_nothing() -> None:
    flows = flows_of(Residual())
    assert flows["third"] == LayerFlow(None, False, True)
    assert flows["second"].source == "first"


def test_an_output_read_by_two_layers_is_no_source() -> None:
    class Branching(Residual):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x).relu()
            return self.second(h), self.third(h)

    assert flows_of(Branching()) == {
        "first": LayerFlow(None, True, False),
        "second": LayerFlow(None, False, True),
        "third": LayerFlow(None, False, True),
    }


def test_reused_and_tied_layers_have_and_are_no_source() -> None:
    class Reused(Pair):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.second(self.first(x).relu()).relu())

    assert flows_of(Reused(nn.Identity()))["second"] == LayerFlow(None, False, True)
    tied = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    tied[2].weight = tied[0].weight
    assert flows_of(tied) == {"0": LayerFlow(None, True, False), "4": LayerFlow(None, False, True)}


def test_attention_is_not_seen_through() -> None:
    model = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, norm_first=True)
    flows = flows_of(model, torch.randn(5, 3, 4))
    assert flows == {"linear1": UNKNOWN, "linear2": LayerFlow("linear1", False, False)}


def test_views_of_the_input_are_recognised() -> None:
    flows = flows_of(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.randn(5, 3, 4))
    assert flows["1"].reads_model_input


def test_an_overwritten_input_is_no_longer_the_input() -> None:
    class Overwriting(Pair):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2))

    assert not flows_of(Overwriting(torch.relu))["first"].reads_model_input


def test_inputs_that_need_gradients_and_keyword_inputs_are_recognised() -> None:
    class Keyword(Pair):
        def forward(self, *, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"y": super().forward(batch["x"])}

    with GradientCapture(model := Keyword(torch.tanh)) as capture:
        model(batch={"x": torch.randn(5, 3, requires_grad=True)})
    assert capture.flows()["first"].reads_model_input and capture.flows()["second"].is_model_output


def test_outputs_are_found_behind_elementwise_operations_and_in_tuples() -> None:
    class TwoOutputs(Pair):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.first(x)
            return h, self.second(h.relu()).sigmoid()

    flows = flows_of(TwoOutputs(nn.Identity()))
    assert flows["first"].is_model_output and flows["second"] == LayerFlow("first", False, True)


def test_a_bare_layer_is_input_and_output() -> None:
    assert flows_of(nn.Linear(3, 2)) == {"": LayerFlow(None, True, True)}


class Switching(nn.Module):
    """Takes another way when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head, self.through_a = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 1), True

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.a if self.through_a else self.b)(x).relu())


def test_forward_passes_that_disagree_leave_no_source_until_cleared() -> None:
    model = Switching()
    with GradientCapture(model) as capture:
        model(torch.randn(5, 3))
        assert capture.flows()["head"].source == "a"
        model.through_a = False
        model(torch.randn(5, 3))
        assert capture.flows()["head"].source is None
        capture.clear()
        assert capture.flows()["head"].source is None
        model(torch.randn(5, 3))
        assert capture.flows()["head"].source == "b" and "a" not in capture.flows()


def test_nothing_is_learned_without_gradients_or_from_an_earlier_graph() -> None:
    model = Pair(nn.Identity())
    with GradientCapture(model) as capture:
        with torch.no_grad():
            model(torch.randn(5, 3))
        assert capture.flows() == {}

    class Carrying(Pair):
        def forward(self, x: Tensor) -> Tensor:
            previous, self.state = getattr(self, "state", None), self.first(x)
            return self.second(self.state if previous is None else previous)

    model = Carrying(nn.Identity())
    with GradientCapture(model) as capture:
        model(torch.randn(5, 3))
        capture.clear()
        model(torch.randn(5, 3))
        assert capture.flows()["second"].source is None


def test_marks_die_with_the_graph() -> None:
    model = Pair(torch.relu)
    with GradientCapture(model):
        output = model(torch.randn(5, 3))
        values = [value for value in output.grad_fn.metadata.values() if isinstance(value, tuple)]
    assert len(values) == 1 and not any(isinstance(part, (Tensor, nn.Module)) for part in values[0])
