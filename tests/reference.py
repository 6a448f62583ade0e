"""The same results by the slowest obvious methods: loops over elements, and sorting of python lists."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gmn_optim.gradients import DecomposedGradient
from gmn_optim.neurons import NeuronSpaces
from gmn_optim.nn import DeepSets, InteractionsAcrossSets, LayerFeatures, ProductLayer, SetPooling


def pooled(rows: Sequence[Tensor], reduction: str) -> Tensor:
    """Return the mean or sum of a list of vectors."""
    total = torch.stack(list(rows)).sum(0)
    return total / len(rows) if reduction == "mean" else total


def interactions_across_sets(layer: InteractionsAcrossSets, x: Tensor) -> Tensor:
    """Return ``M1 x_ij + M2 pool_i' x_i'j + M3 pool_j' x_ij' + M4 pool_i'j' x_i'j' + bias``, element by element."""
    points, neurons, how = range(x.shape[0]), range(x.shape[1]), layer.reduction
    rows = []
    for i in points:
        for j in neurons:
            out = layer.own.weight @ x[i, j] + layer.own.bias
            out = out + layer.over_points.weight @ pooled([x[k, j] for k in points], how)
            out = out + layer.over_neurons.weight @ pooled([x[i, k] for k in neurons], how)
            out = out + layer.over_all.weight @ pooled([x[k, m] for k in points for m in neurons], how)
            rows.append(out)
    return torch.stack(rows).view(len(points), len(neurons), -1)


def deep_sets(layer: DeepSets, x: Tensor) -> Tensor:
    """Return ``M1 x_j + M2 pool_j' x_j' + bias``, neuron by neuron."""
    total = layer.over_neurons.weight @ pooled(list(x), layer.reduction)
    return torch.stack([layer.own.weight @ row + layer.own.bias + total for row in x])


def set_pooling(layer: SetPooling, x: Tensor) -> Tensor:
    """Return ``M1 pool_i x_ij + M2 pool_ij' x_ij' + bias``, neuron by neuron."""
    points, neurons, how = range(x.shape[0]), range(x.shape[1]), layer.reduction
    inner = layer.deep_sets
    total = inner.over_neurons.weight @ pooled([x[i, j] for i in points for j in neurons], how)
    if how == "mean":
        per_neuron = [pooled([x[i, j] for i in points], how) for j in neurons]
    else:
        per_neuron = [sum((x[i, j] for i in points), torch.zeros_like(x[0, 0])) for j in neurons]
    return torch.stack([inner.own.weight @ row + inner.own.bias + total for row in per_neuron])


def product_layer(
    layer: ProductLayer, h: Tensor, spaces: NeuronSpaces, parameters: Sequence[LayerFeatures] | None = None
) -> list[LayerFeatures]:
    """Return both MLPs' outputs, with the concatenations built and the halves of their first layers put together."""
    of_pair, of_neuron = [layer.from_output.weight, layer.from_input.weight], [layer.from_neuron.weight]
    if parameters is not None:
        of_pair.append(layer.from_weight.weight)
        of_neuron.append(layer.from_bias.weight)
    first_pair, first_neuron = torch.cat(of_pair, dim=1), torch.cat(of_neuron, dim=1)

    def mlp1(features: list[Tensor]) -> Tensor:
        hidden = (first_pair @ torch.cat(features) + layer.from_output.bias).relu()
        return layer.to_weight.weight @ hidden + layer.to_weight.bias

    def mlp2(features: list[Tensor]) -> Tensor:
        hidden = (first_neuron @ torch.cat(features) + layer.from_neuron.bias).relu()
        return layer.to_bias.weight @ hidden + layer.to_bias.bias

    outputs = []
    for index, ports in enumerate(spaces.layers):
        outs, ins = h[spaces.place(ports.output_space)], h[spaces.place(ports.input_space)]
        own = parameters[index] if parameters is not None else None
        weight = [
            torch.stack([mlp1([hi, hj] + ([own.weight[i, j]] if own else [])) for j, hj in enumerate(ins)])
            for i, hi in enumerate(outs)
        ]
        bias = [mlp2([hi] + ([own.bias[i]] if own else [])) for i, hi in enumerate(outs)]
        outputs.append(LayerFeatures(torch.stack(weight), torch.stack(bias)))
    return outputs


def per_sample_gradients(
    loss: Callable[[dict[str, Tensor], Tensor], Tensor], parameters: dict[str, Tensor], x: Tensor
) -> dict[str, Tensor]:
    """Return each data point's gradient (b, *parameter), by one backward pass for each batch of one."""
    gradients: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for k in range(x.shape[0]):
        leaves = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
        found = torch.autograd.grad(loss(leaves, x[k : k + 1]), list(leaves.values()))
        for name, gradient in zip(leaves, found, strict=True):
            gradients[name].append(gradient)
    return {name: torch.stack(each) for name, each in gradients.items()}


def moving_average(values: Sequence[float], decay: float) -> float:
    """Return ``v <- decay v + (1 - decay) x`` after all values, from zero."""
    average = 0.0
    for value in values:
        average = decay * average + (1.0 - decay) * value
    return average


def adam_direction(
    gradients: Sequence[float], beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8
) -> float:
    """Return Adam's direction for one scalar parameter after all gradients."""
    steps = len(gradients)
    first = moving_average(gradients, beta1) / (1.0 - beta1**steps)
    second = moving_average([g * g for g in gradients], beta2) / (1.0 - beta2**steps)
    return first / (math.sqrt(second) + epsilon)


def root_mean_square(values: Sequence[float]) -> float:
    """Return the root mean square of a list."""
    return math.sqrt(sum(value * value for value in values) / len(values))


def quantile_rows(layers: Sequence[DecomposedGradient], rows: int) -> list[int]:
    """Return the rows at ``rows`` evenly spaced ranks of the summed squared backprops, by sorting a python list.

    Args:
        layers: Gradients with equally many rows (data points times positions).
        rows: How many rows to choose.
    """
    flat = [gradient.backprops.flatten(0, 1).tolist() for gradient in layers]
    norms = [sum(value * value for layer in flat for value in layer[row]) for row in range(len(flat[0]))]
    ranked = sorted(range(len(norms)), key=norms.__getitem__)
    return [ranked[math.floor((k + 0.5) * len(norms) / rows)] for k in range(rows)]
