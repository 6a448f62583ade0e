"""GradMetaNet: an equivariant network from sets of decomposed gradients to features of parameters."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gmn_optim.configuration import is_count, refuse_unknown_keys
from gmn_optim.errors import InvalidArgumentError
from gmn_optim.neurons import NeuronSpaces
from gmn_optim.nn.neuron_encoding import NeuronEncoding
from gmn_optim.nn.product import LayerFeatures, ProductLayer
from gmn_optim.nn.set_layers import DeepSets, InteractionsAcrossSets, Reduction, SetPooling


@dataclass(frozen=True, kw_only=True)
class GradMetaNetConfig:
    """Sizes of a :class:`GradMetaNet`.

    Attributes:
        width: Channels of every hidden layer.
        set_layers: Layers before the pooling over data points (k1), at least 1.
        neuron_layers: Layers after it (k2).
        out_channels: Channels of a parameter at the output. An update rule does not read it: there the network ends
            in the body's first layer and writes as many channels as the body is wide. Cards keep the value all the
            same.
        code_channels: Sinusoidal channels of the positional encoding.
        neuron_numbers: Whether fixed input and output neurons carry their own number.
        reduction: ``mean`` or ``sum`` pooling.
        scale_head: Whether the scales of normalization layers have an MLP of their own; else that of the biases.

    Example:
        >>> GradMetaNetConfig(width=8).reduction
        'mean'
    """

    width: int = 16
    set_layers: int = 2
    neuron_layers: int = 1
    out_channels: int = 14
    code_channels: int = 8
    neuron_numbers: bool = True
    reduction: Reduction = "mean"
    scale_head: bool = False

    def __post_init__(self) -> None:
        sizes = [(self.width, 4_096), (self.out_channels, 4_096), (self.set_layers, 64), (self.neuron_layers, 64, 0)]
        if not all(is_count(*size) for size in sizes):
            raise InvalidArgumentError(
                "GradMetaNet needs whole numbers, width and out_channels from 1 to 4096, set_layers from 1 and "
                f"neuron_layers from 0 to 64, got {self}"
            )
        if not is_count(self.code_channels, 1_024, 0) or self.code_channels % 2:
            raise InvalidArgumentError(f"code_channels is {self.code_channels}; expected an even number, 0 or more")
        if type(self.scale_head) is not bool:
            raise InvalidArgumentError(f"scale_head is {self.scale_head!r}; valid are True and False")
        if self.reduction not in ("mean", "sum"):
            raise InvalidArgumentError(f"reduction is {self.reduction!r}; valid are 'mean' and 'sum'")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "GradMetaNetConfig":
        """Return the configuration with these values.

        Raises:
            InvalidArgumentError: a key is unknown (a file of a newer version) or a value makes no sense.
        """
        refuse_unknown_keys("GradMetaNet configuration", values, cls)
        return cls(**values)


class GradMetaNet(nn.Module):
    """``L_Prod . L_Gamma^k2 . L_Pool . L_Gamma_b^k1 . PE`` with ReLU between.

    The positional code is the same for every data point, so the product of the first layer with the concatenated
    code is a term of its own per neuron; features of neurons that are no sets enter in the same way.

    Args:
        in_channels: Channels of a neuron for each data point (2 for ``(a, g)``).
        neuron_channels: Channels of a neuron that are no sets (statistics over the batch), 0 for none.
        config: Sizes.

    Reference:
        Gelberg et al. (2025), arXiv 2507.01649, section 4.

    Example:
        >>> import torch
        >>> from gmn_optim.neurons import chain_spaces
        >>> spaces = chain_spaces([4, 3, 2])
        >>> net = GradMetaNet(2, config=GradMetaNetConfig(width=8, out_channels=5))
        >>> [tuple(layer.weight.shape) for layer in net(torch.randn(6, 9, 2), spaces)]
        [(3, 4, 5), (2, 3, 5)]
    """

    def __init__(self, in_channels: int, neuron_channels: int = 0, config: GradMetaNetConfig | None = None) -> None:
        super().__init__()
        config = config or GradMetaNetConfig()
        self.config = config
        self.encoding = NeuronEncoding(config.code_channels, config.neuron_numbers)
        self.from_code = nn.Linear(self.encoding.out_channels, config.width, bias=False)
        self.from_neurons = nn.Linear(neuron_channels, config.width, bias=False) if neuron_channels else None
        widths = [in_channels] + [config.width] * config.set_layers
        self.set_layers = nn.ModuleList(
            InteractionsAcrossSets(c, d, config.reduction) for c, d in zip(widths[:-1], widths[1:], strict=True)
        )
        self.pooling = SetPooling(config.width, config.width, config.reduction)
        self.neuron_layers = nn.ModuleList(
            DeepSets(config.width, config.width, config.reduction) for _ in range(config.neuron_layers)
        )
        self.product = ProductLayer(config.width, config.width, config.out_channels, scale_head=config.scale_head)

    def forward(self, sets: Tensor, spaces: NeuronSpaces, neurons: Tensor | None = None) -> list[LayerFeatures]:
        """Return features of every layer's parameters.

        Args:
            sets: Features of neurons over data points (b, n, in_channels).
            spaces: The network's neuron spaces, n neurons in all.
            neurons: Features of neurons (n, neuron_channels), if the network was made with them.
        """
        return self.product(self.embed(sets, spaces, neurons), spaces)

    def embed(self, sets: Tensor, spaces: NeuronSpaces, neurons: Tensor | None = None) -> Tensor:
        """Return the embedding of every neuron (n, width), before the product layer."""
        offset = self.from_code(self.encoding(spaces, sets.dtype, sets.device))
        if self.from_neurons is not None and neurons is not None:
            offset = offset + self.from_neurons(neurons)
        features = self.set_layers[0](sets).add_(offset).relu_()
        for layer in self.set_layers[1:]:
            features = layer(features).relu_()
        embedding = self.pooling(features).relu()
        for layer in self.neuron_layers:
            embedding = layer(embedding).relu()
        return embedding
