"""Normalization layers: each neuron's scale sees the normalized input of that neuron alone, so no outer product."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gmn_optim.capture.adapters import AbstractLayerAdapter, ProbeTerms, register_layer
from gmn_optim.capture.convolution import channels_last
from gmn_optim.gradients import DecomposedGradient


class AbstractNormalizationAdapter(AbstractLayerAdapter):
    """A normalization followed by a scale and, perhaps, a shift of every neuron: ``w * n(x) + b``.

    Activations are ``n(x)`` (b, p, n), backprops the gradient of the output (b, p, n).
    """

    structure = "diagonal"

    def select_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the first argument, positional or by name."""
        return args[0] if args else next(iter(kwargs.values()))

    def recompose(self, module: nn.Module, gradient: DecomposedGradient) -> dict[str, Tensor]:
        """Return the gradients of scale and shift, in their own shape."""
        recomposed = {"weight": gradient.sum_of_products().view_as(module.weight)}
        if getattr(module, "bias", None) is not None:
            recomposed["bias"] = gradient.sum_of_backprops().view_as(module.bias)
        return recomposed

    def gradient_matrix(self, module: nn.Module, gradient: Tensor) -> Tensor:
        """Return the gradient as a column (n, 1): a probe has nothing to sum over."""
        return gradient.reshape(-1, 1)

    def probe(self, module: nn.Module, layer_input: Tensor, output_gradient: Tensor, probes: Tensor) -> ProbeTerms:
        """Return the sum of ``g * n(x)`` (n, 1) times the probe's sign."""
        terms = (self.activations(module, layer_input) * self.backprops(module, output_gradient)).flatten(0, 1)
        return ProbeTerms(terms.sum(0).unsqueeze(1) * probes, torch.linalg.vector_norm(terms))


@register_layer(nn.LayerNorm)
class LayerNormAdapter(AbstractNormalizationAdapter):
    """``nn.LayerNorm`` over one or several last axes."""

    def activations(self, module: nn.Module, layer_input: Tensor) -> Tensor:
        """Return the normalized input (b, p, n)."""
        normalized = functional.layer_norm(layer_input, module.normalized_shape, None, None, module.eps)
        return _over_last_axes(normalized, len(module.normalized_shape))

    def backprops(self, module: nn.Module, output_gradient: Tensor) -> Tensor:
        """Return the gradient of the output (b, p, n)."""
        return _over_last_axes(output_gradient, len(module.normalized_shape))

    def widths(self, module: nn.Module) -> tuple[int, int]:
        """Return the number of normalized neurons, twice."""
        width = math.prod(module.normalized_shape)
        return width, width


@register_layer(nn.RMSNorm)
class RMSNormAdapter(LayerNormAdapter):
    """``nn.RMSNorm`` over one or several last axes."""

    parameter_names = ("weight",)

    def activations(self, module: nn.Module, layer_input: Tensor) -> Tensor:
        """Return the normalized input (b, p, n)."""
        normalized = functional.rms_norm(layer_input, module.normalized_shape, None, module.eps)
        return _over_last_axes(normalized, len(module.normalized_shape))


@register_layer(
    *(
        f"transformers.models.{model}.modeling_{model}.{kind}"
        for model, kind in {
            "llama": "LlamaRMSNorm",
            "mistral": "MistralRMSNorm",
            "mixtral": "MixtralRMSNorm",
            "phi3": "Phi3RMSNorm",
            "qwen2": "Qwen2RMSNorm",
            "qwen3": "Qwen3RMSNorm",
            "mamba": "MambaRMSNorm",
            "t5": "T5LayerNorm",
        }.items()
    )
)
class TransformersRMSNormAdapter(AbstractNormalizationAdapter):
    """The RMS norms of Hugging Face transformers, a class for each model: they scale ``x / sqrt(mean(x^2) + e)``."""

    parameter_names = ("weight",)
    arithmetic = torch.float32

    def activations(self, module: nn.Module, layer_input: Tensor) -> Tensor:
        """Return the normalized input (b, p, n)."""
        normalized = functional.rms_norm(layer_input, module.weight.shape, None, module.variance_epsilon)
        return _over_last_axes(normalized, 1)

    def backprops(self, module: nn.Module, output_gradient: Tensor) -> Tensor:
        """Return the gradient of the output (b, p, n)."""
        return _over_last_axes(output_gradient, 1)

    def widths(self, module: nn.Module) -> tuple[int, int]:
        """Return the number of neurons, twice."""
        return module.weight.numel(), module.weight.numel()


class AbstractChannelNormAdapter(AbstractNormalizationAdapter):
    """A normalization of (b, channels, ...), positions being the other axes."""

    def backprops(self, module: nn.Module, output_gradient: Tensor) -> Tensor:
        """Return the gradient of the output (b, positions, channels)."""
        return channels_last(output_gradient, output_gradient.dim() - 2)

    def widths(self, module: nn.Module) -> tuple[int, int]:
        """Return the number of channels, twice."""
        return module.weight.numel(), module.weight.numel()

    def neuron_axis(self, module: nn.Module) -> int:
        """Return the axis of channels."""
        return 1


@register_layer(nn.GroupNorm)
class GroupNormAdapter(AbstractChannelNormAdapter):
    """``nn.GroupNorm``."""

    def activations(self, module: nn.Module, layer_input: Tensor) -> Tensor:
        """Return the normalized input (b, positions, channels)."""
        normalized = functional.group_norm(layer_input, module.num_groups, None, None, module.eps)
        return channels_last(normalized, layer_input.dim() - 2)


@register_layer(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
class BatchNormAdapter(AbstractChannelNormAdapter):
    """``nn.BatchNorm1d/2d/3d``: statistics of the batch in training, running ones in evaluation.

    A data point's factors are its share of the batch's gradient; what it does to the others by way of the statistics
    is in their backprops.
    """

    def activations(self, module: nn.Module, layer_input: Tensor) -> Tensor:
        """Return the normalized input (b, positions, channels)."""
        of_batch = module.training or module.running_mean is None
        statistics = (None, None) if of_batch else (module.running_mean, module.running_var)
        normalized = functional.batch_norm(layer_input, *statistics, training=of_batch, eps=module.eps)
        return channels_last(normalized, layer_input.dim() - 2)


@register_layer(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
class InstanceNormAdapter(AbstractChannelNormAdapter):
    """``nn.InstanceNorm1d/2d/3d`` with a scale and without running statistics."""

    def supports(self, module: nn.Module) -> bool:
        """Whether each data point is normalized by its own statistics."""
        return module.affine and not module.track_running_stats

    def activations(self, module: nn.Module, layer_input: Tensor) -> Tensor:
        """Return the normalized input (b, positions, channels)."""
        normalized = functional.instance_norm(_batched(module, layer_input), eps=module.eps)
        return channels_last(normalized, normalized.dim() - 2)

    def backprops(self, module: nn.Module, output_gradient: Tensor) -> Tensor:
        """Return the gradient of the output (b, positions, channels)."""
        return super().backprops(module, _batched(module, output_gradient))

    def neuron_axis(self, module: nn.Module) -> int:
        """Return the axis of channels, counted from the end: the axis of data points may be missing."""
        return -module._get_no_batch_dim()


def _batched(module: nn.Module, tensor: Tensor) -> Tensor:
    """Return what an instance normalization reads or returns with an axis of data points, one where there was none."""
    return tensor.unsqueeze(0) if tensor.dim() == module._get_no_batch_dim() else tensor


def _over_last_axes(tensor: Tensor, axes: int) -> Tensor:
    """Return (b, ..., *normalized) as (b, p, n); one data point where there are no other axes."""
    flat = tensor.flatten(-axes)
    if flat.dim() == 1:
        return flat[None, None]
    return flat.unsqueeze(1) if flat.dim() == 2 else flat.flatten(1, -2)
