"""The product layer: from features of neurons to features of the parameters between them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gmn_optim.neurons import LayerPorts, NeuronSpaces


class LayerFeatures(NamedTuple):
    """Features of one layer's parameters: weight (o, i, c) and bias (o, c).

    Example:
        >>> LayerFeatures(weight=torch.zeros(3, 4, 2), bias=torch.zeros(3, 2)).bias.shape
        torch.Size([3, 2])
    """

    weight: Tensor
    bias: Tensor


class ProductLayer(nn.Module):
    """``W_ij = MLP1([h_i, h_j])`` and ``b_i = MLP2(h_i)``, i an output and j an input neuron of a layer.

    The first layer of MLP1 is two products per neuron and a broadcast sum; the concatenation is never built.

    Args:
        neuron_channels: Channels of a neuron.
        hidden_channels: Hidden width of both MLPs.
        out_channels: Channels of a parameter.
        parameter_channels: Channels of the parameters' own features, ``MLP1([h_i, h_j, W_ij])``; 0 for none.

    Reference:
        Gelberg et al. (2025), arXiv 2507.01649, section 4 (with parameters: appendix).

    Example:
        >>> import torch
        >>> from gmn_optim.neurons import chain_spaces
        >>> features = ProductLayer(6, 8, 3)(torch.randn(9, 6), chain_spaces([4, 3, 2]))
        >>> [tuple(f.weight.shape) for f in features], tuple(features[0].bias.shape)
        ([(3, 4, 3), (2, 3, 3)], (3, 3))
    """

    def __init__(
        self, neuron_channels: int, hidden_channels: int, out_channels: int, parameter_channels: int = 0
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.from_output = nn.Linear(neuron_channels, hidden_channels)
        self.from_input = nn.Linear(neuron_channels, hidden_channels, bias=False)
        self.to_weight = nn.Linear(hidden_channels, out_channels)
        self.from_neuron = nn.Linear(neuron_channels, hidden_channels)
        self.to_bias = nn.Linear(hidden_channels, out_channels)
        self.from_weight = nn.Linear(parameter_channels, hidden_channels, bias=False) if parameter_channels else None
        self.from_bias = nn.Linear(parameter_channels, hidden_channels, bias=False) if parameter_channels else None

    def forward(
        self, neurons: Tensor, spaces: NeuronSpaces, parameters: Sequence[LayerFeatures] | None = None
    ) -> list[LayerFeatures]:
        """Return the features of every layer's weight (o, i, c) and bias (o, c).

        Args:
            neurons: Features of all neurons (n, f).
            spaces: The network's neuron spaces.
            parameters: Per layer, features of its parameters, needed iff the layer was made with
                ``parameter_channels``.
        """
        hidden = self.hidden(neurons)
        outputs = []
        for index, ports in enumerate(spaces.layers):
            weight, bias = hidden.weight(ports, spaces), hidden.bias(ports, spaces)
            if parameters is not None and self.from_weight is not None and self.from_bias is not None:
                weight = weight + self.from_weight(parameters[index].weight)
                bias = bias + self.from_bias(parameters[index].bias)
            outputs.append(LayerFeatures(self.to_weight(weight.relu()), self.to_bias(bias.relu())))
        return outputs

    def flat(
        self, neurons: Tensor, spaces: NeuronSpaces, weights: Sequence[str], biases: Sequence[str]
    ) -> list[Tensor]:
        """Return features of all named layers' weights as one (weights, c), then of their biases as one (biases, c).

        The same as :meth:`forward`, by few large products instead of many small ones; what is empty is left out.
        """
        hidden = self.hidden(neurons)
        in_weights = [hidden.weight(spaces.layer(name), spaces).flatten(0, 1) for name in weights]
        in_biases = [hidden.bias(spaces.layer(name), spaces) for name in biases]
        return [
            nn.functional.linear(_joined(pieces).relu(), last.weight).add_(last.bias)
            for pieces, last in ((in_weights, self.to_weight), (in_biases, self.to_bias))
            if pieces
        ]

    def hidden(self, neurons: Tensor) -> "_Hidden":
        """Return what the first layers of both MLPs make of every neuron by itself."""
        return _Hidden(self.from_output(neurons), self.from_input(neurons), self.from_neuron(neurons))


class _Hidden(NamedTuple):
    """First-layer terms of every neuron (n, h): as output, as input, and for its bias."""

    as_output: Tensor
    as_input: Tensor
    for_bias: Tensor

    def weight(self, ports: LayerPorts, spaces: NeuronSpaces) -> Tensor:
        """Return the pre-activations of MLP1 for a layer (o, i, h)."""
        rows = self.as_output[spaces.place(ports.output_space)]
        columns = self.as_input[spaces.place(ports.input_space)]
        return rows.unsqueeze(1) + columns.unsqueeze(0)

    def bias(self, ports: LayerPorts, spaces: NeuronSpaces) -> Tensor:
        """Return the pre-activations of MLP2 for a layer (o, h)."""
        return self.for_bias[spaces.place(ports.output_space)]


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    """Return the pieces one behind the other, without a copy where there is only one."""
    return pieces[0] if len(pieces) == 1 else torch.cat(tuple(pieces))
