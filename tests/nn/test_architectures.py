"""What every module of gmn_optim.nn must pass: it sees no order, leaves its input alone, and can be trained."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils._pytree import tree_leaves

from gmn_optim.neurons import (
    LayerPorts,
    LayerSpec,
    LayerWiring,
    NeuronSpace,
    NeuronSpaces,
    chain_spaces,
)
from gmn_optim.streams import infer_spaces
from gmn_optim.testing import Output, assert_equivariant
from tests.tables import ARCHITECTURES

CASES = [
    pytest.param(kind, variant, id=f"{kind.__name__} {variant}")
    for kind, case in ARCHITECTURES.items()
    for variant in case.variants
]
WITH_WEIGHTS = [case for case in CASES if list(ARCHITECTURES[case.values[0]].variants[case.values[1]]().parameters())]
IN, HIDDEN, OUT = NeuronSpace(3, "input", 0), NeuronSpace(4, "hidden", 1), NeuronSpace(2, "output", 2)
WIRINGS = {
    "chain": chain_spaces([3, 5, 1, 4, 2]),
    "branched": NeuronSpaces(
        (IN, HIDDEN, OUT, NeuronSpace(5, "hidden", 0)),
        (LayerPorts("a", 0, 1), LayerPorts("b", 1, 2), LayerPorts("c", 3, 1)),
    ),
    "two layers on one space": NeuronSpaces(
        (IN, HIDDEN, OUT), (LayerPorts("a", 0, 1), LayerPorts("b", 1, 2), LayerPorts("c", 1, 1))
    ),
    "a table and a normalization": NeuronSpaces(
        (NeuronSpace(1, "hidden", 0), HIDDEN, OUT),
        (
            LayerPorts("t", 0, 1, structure="table", rows=3),
            LayerPorts("s", 1, 1, structure="diagonal"),
            LayerPorts("b", 1, 2),
        ),
    ),
    "a stream": infer_spaces(
        {"a": LayerSpec(3, 4), "b": LayerSpec(4, 4), "c": LayerSpec(4, 2)},
        {"a": LayerWiring(None, tuple("hijk"), True), "b": LayerWiring(tuple("hijk"), tuple("hijk"))}
        | {"c": LayerWiring(tuple("hijk"), None, False, True)},
    ),
}
SPACES = chain_spaces([2, 3, 2])


class Applied(nn.Module):
    """A module as a function of sets, spaces and features of neurons; its weights, heads too, random and not zero."""

    def __init__(self, kind: type[nn.Module], variant: str, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner, self.case = ARCHITECTURES[kind].variants[variant]().double(), ARCHITECTURES[kind]
        for parameter in self.inner.parameters():
            nn.init.normal_(parameter, std=0.4)

    def forward(self, sets: Tensor, spaces: NeuronSpaces, neurons: Tensor | None) -> Output:
        """Return what the module makes of its inputs."""
        return self.case.apply(self.inner, sets, spaces, neurons)

    def tensors(self, sets: Tensor, neurons: Tensor | None) -> list[Tensor]:
        """Return the same as a list of tensors."""
        return tree_leaves(self(sets, SPACES, neurons))

    def draw(self) -> tuple[Tensor, Tensor | None]:
        """Return sets (4, 7, 2) and, where the module reads them, features of neurons (7, 3)."""
        torch.manual_seed(1)
        sets, neurons = torch.randn(4, 7, 2, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
        return sets, neurons if self.case.neuron_channels else None


@pytest.fixture(name="module")
def fixture_module(kind: type[nn.Module], variant: str) -> Applied:
    """Return the module of a row."""
    return Applied(kind, variant)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_it_is_equivariant(module: Applied, wiring: str, dtype: torch.dtype) -> None:
    channels = {"in_channels": 2, "neuron_channels": module.case.neuron_channels}
    assert_equivariant(module.to(dtype), WIRINGS[wiring], dtype=dtype, **channels)


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_it_leaves_its_input_as_it_is(module: Applied) -> None:
    given = module.draw()
    module.tensors(*given)
    torch.testing.assert_close(given, module.draw(), rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "variant"), WITH_WEIGHTS)
def test_every_weight_has_a_gradient(module: Applied) -> None:
    torch.stack([part.square().sum() for part in module.tensors(*module.draw())]).sum().backward()
    assert [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_its_gradients_are_those_of_finite_differences(module: Applied) -> None:
    sets, neurons = module.draw()
    names = [name for name, _ in module.named_parameters()]

    def outputs(sets: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        found = functional_call(module, dict(zip(names, weights, strict=True)), (sets, SPACES, neurons))
        return tuple(tree_leaves(found))

    weights = [p.detach().clone().requires_grad_() for p in module.parameters()]
    assert torch.autograd.gradcheck(outputs, (sets.requires_grad_(), *weights), fast_mode=True)


@pytest.mark.parametrize(("kind", "variant"), WITH_WEIGHTS)
def test_it_maps_over_its_weights(kind: type[nn.Module], variant: str) -> None:
    modules = [Applied(kind, variant, seed) for seed in range(3)]
    (sets, neurons), (stacked, _) = modules[0].draw(), stack_module_state(modules)
    found = vmap(lambda weights: functional_call(modules[0], weights, (sets, SPACES, neurons)))(stacked)
    for number, module in enumerate(modules):
        for one, other in zip(tree_leaves(found), module.tensors(sets, neurons), strict=True):
            torch.testing.assert_close(one[number], other, rtol=1e-12, atol=1e-12)
