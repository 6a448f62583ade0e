"""The assertion that captured factors are a module's gradients."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from gmn_optim.capture import GradientCapture
from gmn_optim.capture.adapters import require_adapter
from gmn_optim.gradients import GradientSet
from gmn_optim.testing.tolerances import relative_error, tolerance_for


def assert_recomposes(
    module: nn.Module, inputs: Tensor | tuple[Tensor, ...], *, seed: int = 0, tolerance: float | None = None
) -> None:
    """Assert that the captured factors of ``module`` are its gradients, for sum and mean losses.

    Of every served parameter: the sum over rows of ``g a^T``, and what the adapter recomposes, against ``.grad``; and
    each data point's own gradient against ``vmap(grad)``, unless the module does not map, data points depend on one
    another, or the input has no axis of them. A copy of the module is used.

    Args:
        module: A layer, or a model of layers.
        inputs: What it takes: tensors with data points on their first axis, or one (i) without.
        seed: Of the loss, a random linear function of the output, and of what the module itself draws.
        tolerance: Largest error relative to the largest value; None for that of the dtype in :data:`TOLERANCES`.

    Raises:
        AssertionError: a parameter's gradient is not recomposed, or no parameter is served or has a gradient.

    Example:
        >>> assert_recomposes(nn.Linear(3, 2).double(), torch.randn(5, 4, 3, dtype=torch.float64))
        >>> assert_recomposes(nn.PReLU(), torch.randn(5, 3))
        Traceback (most recent call last):
            ...
        AssertionError: nothing is tested: no adapter serves a parameter of this PReLU
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
    """A module after one backward pass: its arguments and output, the loss's weights, and what was captured."""

    module: nn.Module
    arguments: tuple[Tensor, ...]
    output: Tensor
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
        return _Pass(module, arguments, output.detach(), cotangent, capture.gradients(), capture.layers, served)


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
        bound = tolerance_for(gradient.dtype, tolerance)
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
    is_weight = owner in passed.gradients and _slot(passed, name, owner) == adapter.parameter_names[0]
    if not is_weight or adapter.structure != "matrix":
        return {}
    summed = passed.gradients[owner].sum_of_outer_products(adapter.groups(layer))
    return {"sum of g a^T": (summed, adapter.gradient_matrix(layer, gradient))}


def _per_sample_gradients(passed: _Pass) -> dict[str, Tensor] | None:
    """Return each data point's share of the gradients, or None where they do not stand by themselves."""
    if any(argument.dim() < 2 for argument in passed.arguments):
        return None

    def share(parameters: dict[str, Tensor], cotangent: Tensor, *one: Tensor) -> tuple[Tensor, Tensor]:
        output = functional_call(passed.module, parameters, tuple(each.unsqueeze(0) for each in one)).squeeze(0)
        return (output * cotangent).sum(), output

    parameters = {name: parameter.detach() for name, parameter in passed.module.named_parameters()}
    in_dims = (None, *[0] * (1 + len(passed.arguments)))
    try:
        found, outputs = vmap(grad(share, has_aux=True), in_dims)(parameters, passed.cotangent, *passed.arguments)
    except (RuntimeError, ValueError):  # running statistics, random numbers, or no data points on the first axis
        return None
    # statistics of the batch make a data point's output that of another function
    return found if relative_error(outputs, passed.output) <= tolerance_for(outputs.dtype, None) else None


def _misfit(found: Tensor | None, expected: Tensor, tolerance: float) -> str:
    """Say how a tensor misses another one; nothing where it does not."""
    if found is None:
        return "is missing"
    if found.shape != expected.shape:
        return f"has shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    error = relative_error(found, expected)
    return "" if error <= tolerance else f"is off by {error:.1e} of the largest element, tolerance {tolerance:.0e}"
