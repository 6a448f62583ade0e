"""The assertion that an untrained rule is its nominal term."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gmn_optim.gradients import DecomposedGradient
from gmn_optim.neuron_sets import gather_neurons
from gmn_optim.neurons import NeuronSpaces, chain_spaces
from gmn_optim.rule import Layout, RuleConfig, Segment, UpdateRule, build_chunks
from gmn_optim.testing.tolerances import relative_error

ROUNDING = 1e-15
"""Largest difference in float64, relative to the largest element."""


def assert_untrained_is_nominal(config: RuleConfig, *, steps: int = 5, seed: int = 0) -> None:
    """Assert that a rule before any meta-training takes the steps of its nominal term.

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
            neurons = gather_neurons(factors, spaces, config.data_points) if config.reads_neurons else None
            found, state = rule(parameters, gradients, state, layout, neurons, factors=factors)
            nominal, plain_state = plain(parameters, gradients, plain_state, layout, factors=factors)
            _compare_steps(step, [update.step for update in found], [update.step for update in nominal])


def _compare_steps(number: int, found: Sequence[Tensor], nominal: Sequence[Tensor]) -> None:
    """Raise if steps are not the same up to the order of multiplications, or all zero."""
    if not any(each.any() for each in nominal):
        raise AssertionError(f"nothing is tested: the nominal term's step {number} is zero")
    if any(relative_error(*pair) > ROUNDING for pair in zip(found, nominal, strict=True)):
        errors = ", ".join(f"{relative_error(*pair):.1e}" for pair in zip(found, nominal, strict=True))
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
