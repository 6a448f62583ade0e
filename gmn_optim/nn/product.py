"""The product layer: from features of neurons to features of the parameters between them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gmn_optim.neurons import LayerPorts, NeuronSpaces


class FeatureRun(NamedTuple):
    """Features of consecutive parameters, a stretch of them that is repeated.

    Attributes:
        features: Of one stretch (size, c).
        repeats: How often it stands there, the same each time.
    """

    features: Tensor
    repeats: int = 1


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
        scale_head: Whether the scales of normalization layers, one per neuron, have an MLP of their own; else they are
            read by that of the biases.

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
        self,
        neuron_channels: int,
        hidden_channels: int,
        out_channels: int,
        parameter_channels: int = 0,
        scale_head: bool = False,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.from_output = nn.Linear(neuron_channels, hidden_channels)
        self.from_input = nn.Linear(neuron_channels, hidden_channels, bias=False)
        self.to_weight = nn.Linear(hidden_channels, out_channels)
        self.from_neuron = nn.Linear(neuron_channels, hidden_channels)
        self.to_bias = nn.Linear(hidden_channels, out_channels)
        self.from_scaled = nn.Linear(neuron_channels, hidden_channels) if scale_head else None
        self.to_scale = nn.Linear(hidden_channels, out_channels) if scale_head else None
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
        self, neurons: Tensor, spaces: NeuronSpaces, layers: Mapping[str, Sequence[str]], rows: slice | None = None
    ) -> list[FeatureRun]:
        """Return features of the named layers' parameters, behind one another: weights, tables, scales, biases.

        The same as :meth:`forward`, by few large products instead of many small ones; what is empty is left out.

        Args:
            neurons: Features of all neurons (n, f).
            spaces: The network's neuron spaces.
            layers: For each of the roles ``weight``, ``table``, ``scale`` and ``bias``, layers in order.
            rows: Only these rows of a single parameter.
        """
        hidden = self.hidden(neurons)
        ports = {role: [spaces.layer(name) for name in names] for role, names in layers.items()}
        runs = [
            self._run([hidden.weight(each, spaces, rows) for each in ports.get("weight", ())], self.to_weight),
            *(self._table(hidden, each, spaces, rows) for each in ports.get("table", ())),
            self._run(
                [hidden.scale(each, spaces, rows) for each in ports.get("scale", ())], self.to_scale or self.to_bias
            ),
            self._run([hidden.bias(each, spaces, rows) for each in ports.get("bias", ())], self.to_bias),
        ]
        return [run for run in runs if run is not None]

    def hidden(self, neurons: Tensor) -> "_Hidden":
        """Return what the first layers of the MLPs make of every neuron by itself."""
        scaled = None if self.from_scaled is None else self.from_scaled(neurons)
        return _Hidden(self.from_output(neurons), self.from_input(neurons), self.from_neuron(neurons), scaled)

    def _run(self, pieces: Sequence[Tensor], last: nn.Linear) -> FeatureRun | None:
        """Return what the last layer makes of pre-activations (..., h), one behind the other."""
        if not pieces:
            return None
        flat = [piece.reshape(-1, piece.shape[-1]) for piece in pieces]
        return FeatureRun(nn.functional.linear(_joined(flat).relu(), last.weight).add_(last.bias))

    def _table(
        self, hidden: "_Hidden", ports: LayerPorts, spaces: NeuronSpaces, rows: slice | None
    ) -> FeatureRun | None:
        """Return features of one row of a table, which are those of every row."""
        of_row = self._run([hidden.weight(ports, spaces)], self.to_weight)
        count = ports.rows if rows is None else rows.stop - rows.start
        return None if of_row is None else of_row._replace(repeats=count)


class _Hidden(NamedTuple):
    """First-layer terms of every neuron (n, h): as output, as input, for its bias, and for its scale where apart."""

    as_output: Tensor
    as_input: Tensor
    for_bias: Tensor
    for_scale: Tensor | None = None

    def weight(self, ports: LayerPorts, spaces: NeuronSpaces, rows: slice | None = None) -> Tensor:
        """Return the pre-activations of MLP1 for a layer (o, i / groups, h), or for some of its rows."""
        outputs = self.as_output[spaces.place(ports.output_space)]
        inputs = self.as_input[spaces.place(ports.input_space)]
        if ports.groups == 1:
            return (outputs if rows is None else outputs[rows]).unsqueeze(1) + inputs.unsqueeze(0)
        blocks = (each.unflatten(0, (ports.groups, -1)) for each in (outputs, inputs))
        pairs = (next(blocks).unsqueeze(2) + next(blocks).unsqueeze(1)).flatten(0, 1)
        return pairs if rows is None else pairs[rows]

    def bias(self, ports: LayerPorts, spaces: NeuronSpaces, rows: slice | None = None) -> Tensor:
        """Return the pre-activations of MLP2 for a layer (o, h), or for some of its rows."""
        outputs = self.for_bias[spaces.place(ports.output_space)]
        return outputs if rows is None else outputs[rows]

    def scale(self, ports: LayerPorts, spaces: NeuronSpaces, rows: slice | None = None) -> Tensor:
        """Return the pre-activations of the scales' MLP for a layer (o, h), or for some of its rows."""
        outputs = (self.for_bias if self.for_scale is None else self.for_scale)[spaces.place(ports.output_space)]
        return outputs if rows is None else outputs[rows]


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    """Return the pieces one behind the other, without a copy where there is only one."""
    return pieces[0] if len(pieces) == 1 else torch.cat(tuple(pieces))
