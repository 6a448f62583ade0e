"""Assertions for tests of networks, layer adapters and rules of one's own.

Inputs are random, drawn from generators of their own; the global random state stays as it is. What fails, fails with
an ``AssertionError`` that tells how large the error is and where.
"""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from gmn_optim.capture import GradientCapture
from gmn_optim.capture.adapters import require_adapter
from gmn_optim.gradients import DecomposedGradient, GradientSet
from gmn_optim.neurons import NeuronSpaces, chain_spaces, gather_neurons
from gmn_optim.nn.product import LayerFeatures
from gmn_optim.rule import Layout, RuleConfig, Segment, UpdateRule, build_chunks

Permutations = tuple[Tensor, ...]
"""For every space the old places of its neurons in their new order (width)."""

Output = Sequence[LayerFeatures] | Tensor
"""Features of parameters, of neurons (n, d), or of neurons over data points (b, n, d)."""

Network = Callable[[Tensor, NeuronSpaces, Tensor | None], Output]

TOLERANCES: Mapping[torch.dtype, float] = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest error, relative to the largest value, that counts as rounding."""


def random_permutations(
    spaces: NeuronSpaces, generator: torch.Generator, kinds: Collection[str] = ("hidden",)
) -> Permutations:
    """Return a permutation for every space: none is the identity where ``kinds`` has the space and it has two neurons.

    Args:
        spaces: The network's neuron spaces.
        generator: Source of randomness.
        kinds: Kinds of spaces to permute; other spaces stay as they are.

    Example:
        >>> [p.tolist() for p in random_permutations(chain_spaces([3, 2, 1]), torch.Generator())]
        [[0, 1, 2], [1, 0], [0]]
    """
    return tuple(
        _shuffled(space.width, generator) if space.kind in kinds else torch.arange(space.width)
        for space in spaces.spaces
    )


def permute_neurons(features: Tensor, spaces: NeuronSpaces, permutations: Permutations) -> Tensor:
    """Return features of neurons (..., n, c) with the neurons of each space in a new order.

    Example:
        >>> spaces = chain_spaces([1, 3, 1])
        >>> order = (torch.tensor([0]), torch.tensor([2, 0, 1]), torch.tensor([0]))
        >>> permute_neurons(torch.arange(5).unsqueeze(-1), spaces, order).flatten().tolist()
        [0, 3, 1, 2, 4]
    """
    places = [spaces.place(number).start + order for number, order in enumerate(permutations)]
    return features.index_select(-2, torch.cat(places).to(features.device))


def permute_parameters(
    features: Sequence[LayerFeatures], spaces: NeuronSpaces, permutations: Permutations
) -> list[LayerFeatures]:
    """Return features of parameters after their neurons took a new order: rows and columns of weights move.

    Args:
        features: Per layer of ``spaces``, features of its weight (o, i, c) and bias (o, c).
        spaces: The network's neuron spaces.
        permutations: Per space, as :func:`random_permutations` makes them.

    Example:
        >>> spaces = chain_spaces([1, 2, 1])
        >>> features = [LayerFeatures(torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[3.0], [4.0]])),
        ...             LayerFeatures(torch.tensor([[[5.0], [6.0]]]), torch.tensor([[7.0]]))]
        >>> order = (torch.tensor([0]), torch.tensor([1, 0]), torch.tensor([0]))
        >>> [layer.weight.flatten().tolist() for layer in permute_parameters(features, spaces, order)]
        [[2.0, 1.0], [6.0, 5.0]]
    """
    permuted = []
    for layer, ports in zip(features, spaces.layers, strict=True):
        rows, columns = permutations[ports.output_space], permutations[ports.input_space]
        permuted.append(LayerFeatures(layer.weight[rows][:, columns], layer.bias[rows]))
    return permuted


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
    bound = _tolerance(dtype, tolerance)
    output = _run(network, inputs, spaces)
    _refuse_constant(_parts(output, spaces), _parts(_run(network, others, spaces), spaces))

    order = _shuffled(data_points, generator)
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
    errors = {name: _relative_error(given[name], part) for name, part in wanted.items()}
    if any(not error <= tolerance for error in errors.values()):
        listed = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        raise AssertionError(f"{fault}; relative errors: {listed}; tolerance {tolerance:.0e}")


def assert_recomposes(
    module: nn.Module, inputs: Tensor | tuple[Tensor, ...], *, seed: int = 0, tolerance: float | None = None
) -> None:
    """Assert that the captured factors of ``module`` are its gradients, for sum and mean losses.

    Of every served parameter: the sum over rows of ``g a^T``, and what the adapter recomposes, against ``.grad``; and
    each data point's own gradient against ``vmap(grad)``, unless the module does not map or the input has no axis of
    data points. A copy of the module is used.

    Args:
        module: A layer, or a model of layers.
        inputs: What it takes: tensors with data points on their first axis, or one (i) without.
        seed: Of the loss, a random linear function of the output, and of what the module itself draws.
        tolerance: Largest error relative to the largest value; None for that of the dtype in :data:`TOLERANCES`.

    Raises:
        AssertionError: a parameter's gradient is not recomposed, or no parameter is served or has a gradient.

    Example:
        >>> assert_recomposes(nn.Linear(3, 2).double(), torch.randn(5, 4, 3, dtype=torch.float64))
        >>> assert_recomposes(nn.LayerNorm(3), torch.randn(5, 3))
        Traceback (most recent call last):
            ...
        AssertionError: nothing is tested: no adapter serves a parameter of this LayerNorm
    """
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    faults = []
    with torch.random.fork_rng(devices=[]):
        for reduction in ("sum", "mean"):
            torch.manual_seed(seed)
            passed = _captured_pass(copy.deepcopy(module), arguments, reduction)
            faults += [f"{fault} ({reduction} loss)" for fault in _recomposition_faults(passed, tolerance)]
    if faults:
        raise AssertionError("; ".join(faults))


class _Pass(NamedTuple):
    """A module after one backward pass: its arguments, the loss's weights, and what was captured."""

    module: nn.Module
    arguments: tuple[Tensor, ...]
    cotangent: Tensor
    gradients: GradientSet
    layers: dict[str, nn.Module]
    owners: dict[str, str]


def _captured_pass(module: nn.Module, arguments: tuple[Tensor, ...], reduction: str) -> _Pass:
    """Run a random linear loss through the module and keep what hooks saw."""
    module.zero_grad()
    with GradientCapture(module) as capture:
        owners = {name: capture.layer_of(p) for name, p in module.named_parameters() if p.requires_grad}
        served = {name: owner for name, owner in owners.items() if owner is not None}
        if not served:
            raise AssertionError(f"nothing is tested: no adapter serves a parameter of this {type(module).__name__}")
        output = module(*arguments)
        cotangent = torch.randn_like(output) / (output.numel() if reduction == "mean" else 1)
        (output * cotangent).sum().backward()
        return _Pass(module, arguments, cotangent, capture.gradients(), capture.layers, served)


def _recomposition_faults(passed: _Pass, tolerance: float | None) -> list[str]:
    """Return a sentence for every parameter whose gradient the factors do not give."""
    expected = dict(passed.module.named_parameters())
    per_sample = _per_sample_gradients(passed)
    faults = []
    for name, owner in passed.owners.items():
        gradient = expected[name].grad
        if gradient is None or not gradient.any():
            faults.append(f"{name}: nothing is tested, its gradient is zero")
            continue
        pairs = {"recomposed gradient": (_recomposed(passed, name, owner), gradient)}
        pairs |= _as_matrices(passed, name, owner, gradient)
        if per_sample is not None:
            pairs["per-sample gradient"] = (_recomposed(passed, name, owner, each=True), per_sample[name])
        bound = _tolerance(gradient.dtype, tolerance)
        faults += [f"{name}: {what} {_misfit(*pair, bound)}" for what, pair in pairs.items() if _misfit(*pair, bound)]
    return faults


def _recomposed(passed: _Pass, name: str, owner: str, each: bool = False) -> Tensor | None:
    """Return the gradient of one parameter from its layer's factors, or None where there is none."""
    if owner not in passed.gradients:
        return None
    gradients = passed.gradients
    found = gradients.per_sample_gradients(owner) if each else gradients.mean_gradient(owner)
    return found.get(_slot(passed, name, owner))


def _slot(passed: _Pass, name: str, owner: str) -> str:
    """Return the name that the owner of the factors has for a parameter of the model."""
    parameter = passed.module.get_parameter(name)
    return next(slot for slot, each in passed.layers[owner]._parameters.items() if each is parameter)


def _as_matrices(passed: _Pass, name: str, owner: str, gradient: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the sum of outer products and the gradient of the weight (o, i); nothing for other parameters."""
    layer = passed.layers[owner]
    adapter = require_adapter(layer, owner)
    if owner not in passed.gradients or _slot(passed, name, owner) != adapter.parameter_names[0]:
        return {}
    return {"sum of g a^T": (passed.gradients[owner].sum_of_outer_products(), adapter.gradient_matrix(layer, gradient))}


def _per_sample_gradients(passed: _Pass) -> dict[str, Tensor] | None:
    """Return each data point's share of the gradients, or None where the module does not map over them."""
    if any(argument.dim() < 2 for argument in passed.arguments):
        return None

    def share(parameters: dict[str, Tensor], cotangent: Tensor, *one: Tensor) -> Tensor:
        output = functional_call(passed.module, parameters, tuple(each.unsqueeze(0) for each in one))
        return (output.squeeze(0) * cotangent).sum()

    parameters = {name: parameter.detach() for name, parameter in passed.module.named_parameters()}
    in_dims = (None, *[0] * (1 + len(passed.arguments)))
    try:
        return vmap(grad(share), in_dims)(parameters, passed.cotangent, *passed.arguments)
    except RuntimeError:  # running statistics, random numbers, or data points that are not on the first axis
        return None


def _misfit(found: Tensor | None, expected: Tensor, tolerance: float) -> str:
    """Say how a tensor misses another one; nothing where it does not."""
    if found is None:
        return "is missing"
    if found.shape != expected.shape:
        return f"has shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    error = _relative_error(found, expected)
    return "" if error <= tolerance else f"is off by {error:.1e} of the largest element, tolerance {tolerance:.0e}"


def assert_untrained_is_nominal(config: RuleConfig, *, steps: int = 5, seed: int = 0) -> None:
    """Assert that a rule before any meta-training takes exactly the steps of its nominal term.

    Raises:
        AssertionError: a step differs, or the nominal steps are zero.

    Example:
        >>> assert_untrained_is_nominal(RuleConfig(nominal="adam"))
    """
    spaces = chain_spaces([4, 3, 2])
    layout = Layout(tuple(build_chunks(_segments(spaces), True)), spaces)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rule, plain = UpdateRule(config).double(), UpdateRule(replace(config, body=None, gradmetanet=None)).double()
        parameters = tuple(torch.randn(chunk.size, dtype=torch.float64) for chunk in layout.chunks)
        state, plain_state = (each.init_state(layout, parameters[0]) for each in (rule, plain))
        for step in range(steps):
            factors = _random_factors(spaces)
            gradients = tuple(chunk.flatten(_recompose_all(factors)) for chunk in layout.chunks)
            neurons = gather_neurons(factors, spaces, config.data_points) if config.gradmetanet else None
            found, state = rule(parameters, gradients, state, layout, neurons)
            nominal, plain_state = plain(parameters, gradients, plain_state, layout)
            _compare_steps(step, [update.step for update in found], [update.step for update in nominal])


def _compare_steps(number: int, found: Sequence[Tensor], nominal: Sequence[Tensor]) -> None:
    """Raise if steps are not the same to the last bit, or all zero."""
    if not any(each.any() for each in nominal):
        raise AssertionError(f"nothing is tested: the nominal term's step {number} is zero")
    if not all(map(torch.equal, found, nominal)):
        errors = ", ".join(f"{_relative_error(*pair):.1e}" for pair in zip(found, nominal, strict=True))
        raise AssertionError(
            f"step {number} of the untrained rule is not its nominal term's; relative errors: {errors}"
        )


def _segments(spaces: NeuronSpaces) -> list[Segment]:
    """Return the places of a plain MLP's parameters."""
    sides = {
        ports.name: (spaces.widths[ports.output_space], spaces.widths[ports.input_space]) for ports in spaces.layers
    }
    weights = [Segment(f"{name}.weight", side, name, "weight") for name, side in sides.items()]
    return weights + [Segment(f"{name}.bias", side[:1], name, "bias") for name, side in sides.items()]


def _random_factors(spaces: NeuronSpaces) -> dict[str, DecomposedGradient]:
    """Return factors of five data points for every layer."""
    widths = [
        (ports.name, spaces.widths[ports.input_space], spaces.widths[ports.output_space]) for ports in spaces.layers
    ]
    return {
        name: DecomposedGradient(*(torch.randn(5, 1, width, dtype=torch.float64) for width in (fan_in, fan_out)))
        for name, fan_in, fan_out in widths
    }


def _recompose_all(factors: Mapping[str, DecomposedGradient]) -> dict[str, Tensor]:
    """Return the gradients of every layer by the parameters' full names."""
    gradients = {}
    for name, factor in factors.items():
        gradients[f"{name}.weight"], gradients[f"{name}.bias"] = (
            factor.sum_of_outer_products(),
            factor.sum_of_backprops(),
        )
    return gradients


def _shuffled(size: int, generator: torch.Generator) -> Tensor:
    """Return a random permutation (size) that is not the identity, where there is one."""
    order = torch.randperm(size, generator=generator)
    return order.roll(1) if torch.equal(order, torch.arange(size)) else order


def _tolerance(dtype: torch.dtype, given: float | None) -> float:
    """Return the tolerance that was given, else the one for the dtype."""
    return TOLERANCES.get(dtype, 1e-2) if given is None else given


def _relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest error relative to the largest expected value; infinite where shapes differ or for NaN."""
    if found.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    error = (found - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return error.nan_to_num(nan=float("inf"), posinf=float("inf")).item()
