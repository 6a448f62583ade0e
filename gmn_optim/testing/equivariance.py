"""The assertion that a network does not see the order of neurons and data points."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gmn_optim.neurons import NeuronSpaces
from gmn_optim.nn.product import LayerFeatures
from gmn_optim.testing.permutations import (
    Permutations,
    permute_neurons,
    permute_parameters,
    random_order,
    random_permutations,
)
from gmn_optim.testing.tolerances import relative_error, tolerance_for

Output = Sequence[LayerFeatures] | Tensor
"""Features of parameters, of neurons (n, d), or of neurons over data points (b, n, d)."""

Network = Callable[[Tensor, NeuronSpaces, Tensor | None], Output]


def assert_equivariant(
    network: Network,
    spaces: NeuronSpaces,
    *,
    in_channels: int,
    neuron_channels: int = 0,
    data_points: int = 7,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    tolerance: float | None = None,
    kinds: Collection[str] = ("hidden",),
) -> None:
    """Assert that permuting neurons and data points at the input does the same at the output.

    Features of parameters and of neurons (n, d) must not depend on the order of the data points; features over data
    points (b, n, d) must follow it.

    Args:
        network: From sets (b, n, in_channels), spaces, and features of neurons (n, neuron_channels) or None, to
            features of every layer's parameters, or of neurons (n, d) or (b, n, d).
        spaces: Neuron spaces to try it on, n neurons in all.
        in_channels: Channels of a neuron for each data point.
        neuron_channels: Channels of a neuron that are no sets; 0 to pass None.
        data_points: Number of data points b.
        seed: Of the inputs and permutations.
        dtype: Of the inputs; the network must have it.
        tolerance: Largest error relative to the largest value; None for that of ``dtype`` in :data:`TOLERANCES`.
        kinds: Kinds of spaces whose neurons are permuted.

    Raises:
        AssertionError: the network is not equivariant or not invariant, or nothing would be tested: a part of the
            output does not depend on the input, or there are no two neurons or data points to swap.

    Example:
        >>> from gmn_optim.neurons import chain_spaces
        >>> from gmn_optim.nn import GradMetaNet
        >>> assert_equivariant(GradMetaNet(2).double(), chain_spaces([4, 3, 2]), in_channels=2)
        >>> assert_equivariant(lambda sets, spaces, neurons: sets[0], chain_spaces([4, 3, 2]), in_channels=2)
        Traceback (most recent call last):
            ...
        AssertionError: output changes with the order of the data points; relative errors: space 0 (input) ...
    """
    if not any(space.kind in kinds and space.width > 1 for space in spaces.spaces) or data_points < 2:
        raise AssertionError(f"nothing is tested: there are no two neurons of kind {kinds}, or no two data points")
    generator = torch.Generator().manual_seed(seed)
    inputs, others = (_random_inputs(spaces, in_channels, neuron_channels, data_points, dtype, generator) for _ in "12")
    bound = tolerance_for(dtype, tolerance)
    output = _run(network, inputs, spaces)
    _refuse_constant(_parts(output, spaces), _parts(_run(network, others, spaces), spaces))

    order = random_order(data_points, generator)
    reordered = _run(network, inputs._replace(sets=inputs.sets[order]), spaces)
    follows = isinstance(output, Tensor) and output.dim() == 3
    what = "does not follow" if follows else "changes with"
    expected = output[order] if follows else output
    _compare(f"output {what} the order of the data points", expected, reordered, spaces, bound)

    permutations = random_permutations(spaces, generator, kinds)
    moved = _run(network, inputs.permuted(spaces, permutations), spaces)
    expected = _permute_output(output, spaces, permutations)
    _compare("output does not follow permutations of neurons", expected, moved, spaces, bound)


class _Inputs(NamedTuple):
    """Arguments of a network: sets (b, n, c) and features of neurons (n, e) or None."""

    sets: Tensor
    neurons: Tensor | None

    def permuted(self, spaces: NeuronSpaces, permutations: Permutations) -> "_Inputs":
        """Return the inputs with their neurons in a new order."""
        return _Inputs(*(each if each is None else permute_neurons(each, spaces, permutations) for each in self))


def _random_inputs(
    spaces: NeuronSpaces,
    channels: int,
    neuron_channels: int,
    points: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> _Inputs:
    """Return normally distributed inputs."""
    sets = torch.randn(points, spaces.size, channels, dtype=dtype, generator=generator)
    if not neuron_channels:
        return _Inputs(sets, None)
    return _Inputs(sets, torch.randn(spaces.size, neuron_channels, dtype=dtype, generator=generator))


@torch.no_grad()
def _run(network: Network, inputs: _Inputs, spaces: NeuronSpaces) -> Output:
    """Return what the network makes of copies of the inputs: it may work in place."""
    return network(inputs.sets.clone(), spaces, None if inputs.neurons is None else inputs.neurons.clone())


def _permute_output(output: Output, spaces: NeuronSpaces, permutations: Permutations) -> Output:
    """Return an output with its neurons in a new order."""
    if isinstance(output, Tensor):
        return permute_neurons(output, spaces, permutations)
    return permute_parameters(output, spaces, permutations)


def _parts(output: Output, spaces: NeuronSpaces) -> dict[str, Tensor]:
    """Return the output by layer, or by space, after checking its form."""
    if isinstance(output, Tensor):
        if output.dim() not in (2, 3) or output.shape[-2] != spaces.size:
            raise AssertionError(
                f"output is {tuple(output.shape)}, expected (n, d) or (b, n, d) with n = {spaces.size}"
            )
        kinds = [space.kind for space in spaces.spaces]
        return {f"space {k} ({kind})": output[..., spaces.place(k), :] for k, kind in enumerate(kinds)}
    if len(output) != len(spaces.layers):
        raise AssertionError(f"output has features of {len(output)} layers, the spaces have {len(spaces.layers)}")
    named = zip(spaces.layers, output, strict=True)
    return {f"{ports.name}.{role}": getattr(layer, role) for ports, layer in named for role in LayerFeatures._fields}


def _refuse_constant(parts: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    """Raise if parts of an output are the same for other inputs: zeros and constants are equivariant to anything."""
    constant = [name for name, part in parts.items() if torch.equal(part, others[name])]
    if constant:
        what = "zero" if not any(parts[name].any() for name in constant) else "the same for other inputs"
        raise AssertionError(f"nothing is tested: the output is {what} in {', '.join(constant)}; draw a random head")


def _compare(fault: str, expected: Output, found: Output, spaces: NeuronSpaces, tolerance: float) -> None:
    """Raise with the error of every part if one is above the tolerance."""
    wanted, given = _parts(expected, spaces), _parts(found, spaces)
    errors = {name: relative_error(given[name], part) for name, part in wanted.items()}
    if any(not error <= tolerance for error in errors.values()):
        listed = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        raise AssertionError(f"{fault}; relative errors: {listed}; tolerance {tolerance:.0e}")
