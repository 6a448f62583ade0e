"""Linear maps that commute with permutations of data points and of neurons.

Features of neurons over data points have shape (b, n, c); pooled over data points, (n, c). All neurons of a network
stand on the one axis n, so that pooling over neurons is pooling over layers too.
"""

from typing import Literal

from torch import Tensor, nn

Reduction = Literal["mean", "sum"]


def pool(features: Tensor, dim: int | tuple[int, ...], reduction: Reduction) -> Tensor:
    """Return the mean or the sum over ``dim``."""
    return features.mean(dim) if reduction == "mean" else features.sum(dim)


class InteractionsAcrossSets(nn.Module):
    """The linear layer equivariant to permutations of data points and of neurons, (b, n, c) to (b, n, d).

    ``out_ij = M1 x_ij + M2 pool_i' x_i'j + M3 pool_j' x_ij' + M4 pool_i'j' x_i'j' + bias``, i a data point, j a neuron.

    Args:
        in_channels: c.
        out_channels: d.
        reduction: ``mean`` carries over to other widths and batch sizes; the paper writes ``sum``.

    Reference:
        Hartford et al. (2018), "Deep models of interactions across sets", arXiv 1803.02879, equation 3;
        Gelberg et al. (2025), arXiv 2507.01649, section 4.

    Example:
        >>> import torch
        >>> InteractionsAcrossSets(2, 5)(torch.randn(7, 9, 2)).shape
        torch.Size([7, 9, 5])
    """

    def __init__(self, in_channels: int, out_channels: int, reduction: Reduction = "mean") -> None:
        super().__init__()
        self.reduction: Reduction = reduction
        self.own = nn.Linear(in_channels, out_channels)
        self.over_points = nn.Linear(in_channels, out_channels, bias=False)
        self.over_neurons = nn.Linear(in_channels, out_channels, bias=False)
        self.over_all = nn.Linear(in_channels, out_channels, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Return the mixed features (b, n, d) of features (b, n, c)."""
        of_neurons = pool(features, 0, self.reduction)
        of_points = pool(features, 1, self.reduction)
        of_all = pool(of_neurons, 0, self.reduction)
        # the bias joins the small term and sums are in place: the large tensor is written, not copied
        per_neuron = self.over_points(of_neurons) + (self.over_all(of_all) + self.own.bias)
        mixed = nn.functional.linear(features, self.own.weight)
        return mixed.add_(per_neuron).add_(self.over_neurons(of_points).unsqueeze(1))


class SetPooling(nn.Module):
    """From features over data points (b, n, c) to features of neurons (n, d), invariant to the order of data points.

    ``out_j = M1 pool_i x_ij + M2 pool_ij' x_ij' + bias``.

    Reference:
        Gelberg et al. (2025), arXiv 2507.01649, section 4.

    Example:
        >>> import torch
        >>> SetPooling(2, 5)(torch.randn(7, 9, 2)).shape
        torch.Size([9, 5])
    """

    def __init__(self, in_channels: int, out_channels: int, reduction: Reduction = "mean") -> None:
        super().__init__()
        self.reduction: Reduction = reduction
        self.deep_sets = DeepSets(in_channels, out_channels, reduction)

    def forward(self, features: Tensor) -> Tensor:
        """Return the pooled features (n, d) of features (b, n, c)."""
        return self.deep_sets(pool(features, 0, self.reduction))


class DeepSets(nn.Module):
    """The linear layer equivariant to permutations of neurons, (n, c) to (n, d).

    ``out_j = M1 x_j + M2 pool_j' x_j' + bias``.

    Reference:
        Zaheer et al. (2017), "Deep sets", arXiv 1703.06114, lemma 3.

    Example:
        >>> import torch
        >>> DeepSets(2, 5)(torch.randn(9, 2)).shape
        torch.Size([9, 5])
    """

    def __init__(self, in_channels: int, out_channels: int, reduction: Reduction = "mean") -> None:
        super().__init__()
        self.reduction: Reduction = reduction
        self.own = nn.Linear(in_channels, out_channels)
        self.over_neurons = nn.Linear(in_channels, out_channels, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Return the mixed features (n, d) of features (n, c)."""
        return self.own(features) + self.over_neurons(pool(features, -2, self.reduction)).unsqueeze(-2)
