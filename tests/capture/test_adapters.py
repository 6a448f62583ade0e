"""An adapter is found by the nearest registered type, and never for a forward pass that nothing is known of."""

import pytest
import torch
from torch import Tensor, nn

from gmn_optim.capture import GradientCapture
from gmn_optim.capture.adapters import find_adapter, register_layer, require_adapter, supported_layers
from gmn_optim.capture.layers import find_layers
from gmn_optim.capture.linear import LinearAdapter
from gmn_optim.errors import InvalidArgumentError, UnsupportedLayerError
from gmn_optim.gradients import DecomposedGradient
from gmn_optim.testing import assert_recomposes
from gmn_optim.weight_order import WeightOrder

pytestmark = pytest.mark.usefixtures("own_registry", "seeded")


class Plain(nn.Linear):
    """A subclass that computes what its parent does."""


class Own(nn.Linear):
    """A subclass with a forward pass of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """Return twice the output."""
        return super().forward(2 * x)


class Grandchild(Own):
    """A subclass of that one."""


class Transposed(nn.Module):
    """A linear layer whose weight lies as (i, o)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ table."""
        return x @ self.table


class TransposedAdapter(LinearAdapter):
    """Knows the layer above."""

    parameter_names = ("table",)

    def recompose(self, module: nn.Module, gradient: DecomposedGradient) -> dict[str, Tensor]:
        """Return the gradient of the table (i, o)."""
        return {"table": gradient.sum_of_outer_products().mT}

    def widths(self, module: nn.Module) -> tuple[int, int]:
        """Return the sides of the table."""
        return tuple(module.table.shape)

    def gradient_matrix(self, module: nn.Module, gradient: Tensor) -> Tensor:
        """Return the gradient as (o, i)."""
        return gradient.mT


FOUND = {nn.Linear: True, Plain: True, Own: False, Grandchild: False}


@pytest.mark.parametrize("kind", FOUND)
def test_a_subclass_is_served_unless_it_computes_something_of_its_own(kind: type[nn.Module]) -> None:
    assert (find_adapter(kind(3, 2)) is not None) == FOUND[kind]


@pytest.mark.parametrize("module", [nn.ReLU(), nn.PReLU(), nn.Sequential(nn.Linear(3, 2)), nn.Identity()])
def test_other_layers_are_not_served(module: nn.Module) -> None:
    assert find_adapter(module) is None


UNSERVED = {
    "sparse gradients": nn.Embedding(9, 4, sparse=True),
    "gradients divided by how often": nn.Embedding(9, 4, scale_grad_by_freq=True),
    "sparse gradients of bags": nn.EmbeddingBag(9, 4, mode="sum", sparse=True),
    "maxima of bags": nn.EmbeddingBag(9, 4, mode="max"),
    "instances without a scale": nn.InstanceNorm1d(4),
    "instances with running statistics": nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
}


@pytest.mark.parametrize("name", UNSERVED)
def test_options_that_no_factors_explain_are_not_served(name: str) -> None:
    assert find_adapter(UNSERVED[name]) is None
    assert find_layers(nn.Sequential(UNSERVED[name])) == []


@pytest.mark.parametrize(
    "module",
    [
        nn.LayerNorm(4, elementwise_affine=False),
        nn.BatchNorm1d(4, affine=False),
        nn.RMSNorm(4, elementwise_affine=False),
    ],
)
def test_layers_without_a_weight_have_nothing_to_serve(module: nn.Module) -> None:
    assert find_layers(nn.Sequential(module)) == []


BAGS = {
    "offsets": (torch.tensor([1, 2, 3, 4, 5]), torch.tensor([0, 2])),
    "weights of their own": (torch.tensor([[1, 2], [3, 4]]), None, torch.rand(2, 2)),
}


@pytest.mark.parametrize("name", BAGS)
def test_bags_of_unequal_members_are_captured_but_not_explained(name: str) -> None:
    model = nn.EmbeddingBag(9, 4, mode="sum")
    with GradientCapture(model) as capture:
        model(*BAGS[name]).square().sum().backward()
    assert len(capture.gradients()[""].backprops) == 0 and not capture.verify()[""].explained


def test_a_kind_may_be_registered_by_its_full_name() -> None:
    class Layer(nn.Linear):
        """A layer of a library that is not imported."""

        __module__, __qualname__ = "library.layers", "Layer"

        def forward(self, x: Tensor) -> Tensor:
            """Return the output."""
            return super().forward(x)

    class Child(Layer):
        """A subclass that computes what its parent does."""

    assert find_adapter(Layer(3, 2)) is None

    @register_layer("library.layers.Layer")
    class LayerAdapter(LinearAdapter):
        """Serves it."""

    assert type(find_adapter(Layer(3, 2))) is type(find_adapter(Child(3, 2))) is LayerAdapter
    assert "library.layers.Layer" in supported_layers() and find_adapter(Own(3, 2)) is None
    with pytest.raises(UnsupportedLayerError, match="library.layers.Layer"):
        require_adapter(nn.PReLU())


def test_a_registered_subclass_has_its_own_adapter_and_so_do_its_children() -> None:
    @register_layer(Own)
    class OwnAdapter(LinearAdapter):
        """Sees what the weight sees."""

        def activations(self, module: nn.Module, layer_input: Tensor) -> Tensor:
            """Return the doubled input."""
            return super().activations(module, 2 * layer_input)

    assert type(find_adapter(Own(3, 2))) is type(find_adapter(Grandchild(3, 2))) is OwnAdapter
    assert type(find_adapter(nn.Linear(3, 2))) is LinearAdapter
    for kind in (Own, Grandchild):
        assert_recomposes(kind(3, 2).double(), torch.randn(5, 3, dtype=torch.float64))


def test_one_adapter_can_serve_several_types_and_a_later_one_replaces_it() -> None:
    class First(LinearAdapter):
        pass

    class Second(LinearAdapter):
        pass

    register_layer(Plain, Own)(First)
    assert type(find_adapter(Plain(3, 2))) is type(find_adapter(Own(3, 2))) is First
    assert register_layer(Own)(Second) is Second
    assert type(find_adapter(Plain(3, 2))) is First and type(find_adapter(Own(3, 2))) is Second
    assert {Plain, Own, nn.Linear} <= set(supported_layers())


@pytest.mark.parametrize("kind", [LinearAdapter, int, "Linear", nn.Linear(3, 2), nn.functional.linear])
def test_only_module_types_can_be_registered(kind: object) -> None:
    with pytest.raises(
        InvalidArgumentError,
        match="register_layer takes subclasses of nn.Module, or their full names 'module.Type', got",
    ):
        register_layer(kind)


def test_a_missing_adapter_is_explained_with_what_to_do() -> None:
    assert type(require_adapter(nn.Linear(3, 2), "head")) is LinearAdapter
    with pytest.raises(UnsupportedLayerError, match=r"'slope' is a PReLU, .*Linear.*register_layer\(PReLU\)"):
        require_adapter(nn.PReLU(), "slope")


@pytest.mark.parametrize("shape", [(3,), (5, 3), (5, 2, 3), (5, 2, 4, 3)])
def test_linear_factors_have_three_axes(shape: tuple[int, ...]) -> None:
    adapter, layer, x = LinearAdapter(), nn.Linear(3, 2), torch.randn(shape)
    points = shape[0] if len(shape) > 1 else 1
    assert adapter.activations(layer, x).shape == (points, x.numel() // 3 // points, 3)
    assert adapter.backprops(layer, layer(x)).shape == (points, x.numel() // 3 // points, 2)
    assert adapter.widths(layer) == (3, 2)


def test_the_input_is_found_by_place_and_by_name() -> None:
    x = torch.ones(5, 3)
    adapter = LinearAdapter()
    assert adapter.select_input(nn.Linear(3, 2), (x,), {}) is x
    assert adapter.select_input(nn.Linear(3, 2), (), {"input": x}) is x


def test_the_gradient_matrix_is_flat_unless_an_adapter_says_otherwise() -> None:
    assert LinearAdapter().gradient_matrix(nn.Linear(3, 2), torch.ones(4, 3, 2, 2)).shape == (4, 12)


def test_a_weight_that_lies_otherwise_in_memory_is_explained_through_its_gradient_matrix() -> None:
    register_layer(Transposed)(TransposedAdapter)
    model, x = Transposed(), torch.randn(5, 3, dtype=torch.float64)
    assert_recomposes(model, x)
    with GradientCapture(model) as capture:
        model(x).square().sum().backward()
    assert capture.verify()[""].explained


def test_a_bias_that_is_added_elsewhere_than_the_factors_is_not_served() -> None:
    model = nn.ConvTranspose1d(4, 6, 3, stride=2)
    with GradientCapture(model) as capture:
        model(torch.randn(5, 4, 7)).square().sum().backward()
    assert list(capture.served_parameters()[""]) == ["weight"] == list(capture.gradients().mean_gradient(""))
    assert capture.layer_of(model.bias) is None and capture.verify()[""].explained


@pytest.mark.parametrize("output_size", [(15,), (16,)])
def test_a_transposed_convolution_may_be_told_how_large_its_output_is(output_size: tuple[int, ...]) -> None:
    model = nn.ConvTranspose1d(4, 6, 3, stride=2).double()
    with GradientCapture(model) as capture:
        model(torch.randn(5, 4, 7, dtype=torch.float64), output_size).square().sum().backward()
    assert capture.verify()[""].explained


def test_an_adapter_may_name_the_order_of_its_weight_alone() -> None:
    class Ordered(LinearAdapter):
        """Says that inputs come first."""

        parameter_names = ("table",)

        def widths(self, module: nn.Module) -> tuple[int, int]:
            """Return the sides of the table."""
            return tuple(module.table.shape)

        def weight_order(self, module: nn.Module) -> WeightOrder:
            """Return the order."""
            return WeightOrder(tuple(module.table.shape), (1, 0))

    register_layer(Transposed)(Ordered)
    model, x = Transposed(), torch.randn(5, 3, dtype=torch.float64)
    assert_recomposes(model, x)
    with GradientCapture(model) as capture:
        model(x).square().sum().backward()
    assert capture.verify()[""].explained
