"""The code of a neuron tells its layer if it is hidden, and its number if it is fixed; nothing else."""

import math

import pytest
import torch

from gmn_optim.neurons import NeuronSpaces, chain_spaces
from gmn_optim.nn import NeuronEncoding

SPACES = chain_spaces([4, 3, 5, 2])


def code(spaces: NeuronSpaces = SPACES, channels: int = 8, neuron_numbers: bool = True) -> torch.Tensor:
    """Return the code of every neuron in float64."""
    return NeuronEncoding(channels, neuron_numbers)(spaces, torch.float64)


@pytest.mark.parametrize("channels", [0, 2, 8])
def test_it_has_the_promised_shape(channels: int) -> None:
    assert code(channels=channels).shape == (14, channels + 3)
    assert NeuronEncoding(channels).out_channels == channels + 3


@pytest.mark.parametrize("numbers", [True, False])
@pytest.mark.parametrize("hidden", [1, 2])
def test_hidden_neurons_of_one_space_are_alike(hidden: int, numbers: bool) -> None:
    part = code(neuron_numbers=numbers)[SPACES.place(hidden)]
    assert torch.equal(part, part[:1].expand_as(part))


def test_hidden_spaces_differ_by_depth() -> None:
    assert not torch.equal(code()[4], code()[7])


@pytest.mark.parametrize("fixed", [0, 3])
def test_fixed_neurons_differ_with_numbers_and_are_alike_without(fixed: int) -> None:
    numbered, plain = code()[SPACES.place(fixed)], code(neuron_numbers=False)[SPACES.place(fixed)]
    assert len(torch.unique(numbered, dim=0)) == len(numbered)
    assert len(torch.unique(plain, dim=0)) == 1


def test_the_last_three_channels_name_the_kind() -> None:
    kinds = [["input", "hidden", "output"][k] for k in code()[:, -3:].argmax(1).tolist()]
    assert kinds == ["input"] * 4 + ["hidden"] * 8 + ["output"] * 2
    assert torch.equal(code()[:, -3:].sum(1), torch.ones(14, dtype=torch.float64))


def test_sinusoids_are_those_of_the_formula() -> None:
    frequencies = [10_000.0 ** (-2 * k / 8) for k in range(4)]
    for neuron, number in {2: 2.0, 5: 1.0, 8: 2.0, 13: 1.0}.items():  # input 2, hidden at depth 1 and 2, output 1
        expected = [math.sin(number * f) for f in frequencies] + [math.cos(number * f) for f in frequencies]
        assert code()[neuron, :8].tolist() == pytest.approx(expected, abs=1e-12)


def test_dtypes_do_not_share_a_cache_entry() -> None:
    encoding = NeuronEncoding(8)
    assert encoding(SPACES, torch.float64).dtype == torch.float64
    assert encoding(SPACES, torch.float32).dtype == torch.float32
    assert encoding(SPACES).dtype == torch.get_default_dtype()
