"""Positional encoding of neurons: what tells layers, and fixed input and output neurons, apart."""

import torch
from torch import Tensor, nn

from gmn_optim.constants import constant
from gmn_optim.neurons import NeuronSpace, NeuronSpaces

_KINDS = ("input", "hidden", "output")


class NeuronEncoding(nn.Module):
    """A sinusoidal code per neuron: its layer for hidden neurons, its own number for input and output neurons.

    Hidden neurons of one space share one code, so the code is equivariant. Three more channels name the kind.

    Args:
        channels: Even number of sinusoidal channels.
        neuron_numbers: Whether fixed neurons carry their own number. Without it the code, and what is built on it,
            is also invariant to permutations of the inputs and outputs of the network.

    Reference:
        Gelberg et al. (2025), arXiv 2507.01649, section 4; Vaswani et al. (2017), arXiv 1706.03762, section 3.5,
        for the frequencies, which the former leaves open.

    Example:
        >>> from gmn_optim.neurons import chain_spaces
        >>> NeuronEncoding(8)(chain_spaces([4, 3, 2])).shape
        torch.Size([9, 11])
    """

    def __init__(self, channels: int = 8, neuron_numbers: bool = True) -> None:
        super().__init__()
        self.channels = channels
        self.neuron_numbers = neuron_numbers
        self.out_channels = channels + len(_KINDS)

    def forward(
        self, spaces: NeuronSpaces, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> Tensor:
        """Return the code of every neuron (n, channels + 3)."""
        dtype, device = dtype or torch.get_default_dtype(), device or torch.get_default_device()
        return _encode(spaces, self.channels, self.neuron_numbers, dtype, device)


@constant()
def _encode(
    spaces: NeuronSpaces, channels: int, neuron_numbers: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the code, computed once for each network."""
    codes = [_space_code(space, channels, neuron_numbers) for space in spaces.spaces]
    return torch.cat(codes).to(dtype=dtype, device=device)


def _space_code(space: NeuronSpace, channels: int, neuron_numbers: bool) -> Tensor:
    """Return the code of one space (width, channels + 3)."""
    kind = torch.zeros(space.width, len(_KINDS), dtype=torch.float64)
    kind[:, _KINDS.index(space.kind)] = 1.0
    if space.kind == "hidden":
        numbers = torch.full((space.width,), float(space.depth), dtype=torch.float64)
    else:
        numbers = torch.arange(space.width, dtype=torch.float64)
    code = _sinusoids(numbers, channels)
    if space.kind != "hidden" and not neuron_numbers:
        code = torch.zeros_like(code)
    return torch.cat([code, kind], dim=1)


def _sinusoids(numbers: Tensor, channels: int) -> Tensor:
    """Return sine and cosine of each number at channels/2 frequencies from 1 down to about 1e-4."""
    exponents = torch.arange(0, channels, 2, dtype=torch.float64) / max(channels, 1)
    angles = numbers[:, None] * torch.pow(10_000.0, -exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
