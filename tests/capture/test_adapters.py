"""An adapter is found by the nearest registered type, and never for a forward pass that nothing is known of."""

import pytest
import torch
from torch import Tensor, nn

from gmn_optim.capture import GradientCapture
from gmn_optim.capture.adapters import find_adapter, register_layer, require_adapter, supported_layers
from gmn_optim.capture.linear import LinearAdapter
from gmn_optim.errors import InvalidArgumentError, UnsupportedLayerError
from gmn_optim.gradients import DecomposedGradient
from gmn_optim.testing import assert_recomposes


@pytest.fixture(autouse=True)
def _seed(own_registry: None) -> None:
    torch.manual_seed(0)


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


@pytest.mark.parametrize("module", [nn.ReLU(), nn.LayerNorm(3), nn.Sequential(nn.Linear(3, 2)), nn.Identity()])
def test_other_layers_are_not_served(module: nn.Module) -> None:
    assert find_adapter(module) is None


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
    with pytest.raises(InvalidArgumentError, match="register_layer takes subclasses of nn.Module, got"):
        register_layer(kind)


def test_a_missing_adapter_is_explained_with_what_to_do() -> None:
    assert type(require_adapter(nn.Linear(3, 2), "head")) is LinearAdapter
    with pytest.raises(UnsupportedLayerError, match=r"'norm' is a LayerNorm, .*Linear.*register_layer\(LayerNorm\)"):
        require_adapter(nn.LayerNorm(3), "norm")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3,), (5, 3), (5, 2, 3), (5, 2, 4, 3), (1, 3)])
def test_linear_layers_recompose(shape: tuple[int, ...], bias: bool) -> None:
    assert_recomposes(nn.Linear(3, 2, bias=bias).double(), torch.randn(shape, dtype=torch.float64))


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
