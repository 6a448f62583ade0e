"""Convolutions: each output position is a linear layer on the patch of the input that it sees."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gmn_optim.capture.adapters import AbstractLayerAdapter, ProbeTerms, register_layer, sum_along
from gmn_optim.capture.rows import EVERY_ROW, RowChoice
from gmn_optim.gradients import DecomposedGradient
from gmn_optim.weight_order import WeightOrder

_CONVOLVE = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


@register_layer(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvolutionAdapter(AbstractLayerAdapter):
    """``nn.Conv1d/2d/3d`` with any stride, padding, padding mode, dilation and groups.

    Positions are output positions; inputs are channels times kernel taps, channel by channel, so that the sum of
    outer products, block by block of the groups, is the weight's gradient (o, i / groups * taps).
    """

    def select_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the only argument, positional or called ``input``."""
        return args[0] if args else kwargs["input"]

    def activations(self, module: nn.Module, layer_input: Tensor) -> Tensor:
        """Return the patches (b, positions, channels * taps)."""
        return self._patches(module, layer_input, EVERY_ROW)

    def backprops(self, module: nn.Module, output_gradient: Tensor) -> Tensor:
        """Return the gradient of the output (b, positions, channels)."""
        return channels_last(output_gradient, len(module.kernel_size))

    def widths(self, module: nn.Module) -> tuple[int, int]:
        """Return input channels times taps, and output channels."""
        return module.in_channels * math.prod(module.kernel_size), module.out_channels

    def groups(self, module: nn.Module) -> int:
        """Return the groups of channels."""
        return module.groups

    def neuron_axis(self, module: nn.Module) -> int:
        """Return the axis of channels, counted from the end: the axis of data points may be missing."""
        return -1 - len(module.kernel_size)

    def input_neurons(self, module: nn.Module, numbers: Tensor) -> Tensor:
        """Return each channel once for every tap."""
        return numbers.repeat_interleave(math.prod(module.kernel_size))

    def decompose(
        self, module: nn.Module, layer_input: Tensor, output_gradient: Tensor, rows: RowChoice = EVERY_ROW
    ) -> DecomposedGradient:
        """Return the factors of the chosen rows; patches of other rows are never formed."""
        backprops = rows.of(self.backprops(module, output_gradient))
        backprops = backprops if rows is EVERY_ROW else backprops * rows.scale
        return DecomposedGradient(self._patches(module, layer_input, rows), backprops)

    def probe(self, module: nn.Module, layer_input: Tensor, output_gradient: Tensor, probes: Tensor) -> ProbeTerms:
        """Return the product by a convolution with the probes as kernels: no patches."""
        kernels = probes.mT.unflatten(1, (module.in_channels // module.groups, *module.kernel_size))
        kernels = kernels.repeat(module.groups, *[1] * (kernels.dim() - 1))
        along = _CONVOLVE[len(module.kernel_size)](
            self._padded(module, layer_input), kernels, None, module.stride, 0, module.dilation, module.groups
        )
        along = channels_last(along, len(module.kernel_size)).flatten(0, 1).unflatten(1, (module.groups, -1))
        # every element of the input is in at most as many patches as the kernel has taps
        size = torch.linalg.vector_norm(layer_input) * math.prod(module.kernel_size) ** 0.5
        return sum_along(along, self.backprops(module, output_gradient).flatten(0, 1), size)

    def _patches(self, module: nn.Module, layer_input: Tensor, rows: RowChoice) -> Tensor:
        """Return the patches of the chosen rows (b, positions, channels * taps)."""
        padded = self._padded(module, layer_input)
        if rows.points is not None:
            padded = padded.index_select(0, rows.points)
        windows = sliding_windows(padded, module.kernel_size, module.stride, module.dilation)
        return windows_at(windows, len(module.kernel_size), rows.positions)

    def _padded(self, module: nn.Module, layer_input: Tensor) -> Tensor:
        """Return the input (b, channels, ...) with its padding around it."""
        batched = layer_input if layer_input.dim() == len(module.kernel_size) + 2 else layer_input.unsqueeze(0)
        if not any(module._reversed_padding_repeated_twice):
            return batched
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        return functional.pad(batched, module._reversed_padding_repeated_twice, mode=mode)


@register_layer(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
class TransposedConvolutionAdapter(AbstractLayerAdapter):
    """``nn.ConvTranspose1d/2d/3d``: each input position writes a patch of the output.

    Positions are input positions, outputs are channels times taps. The bias is added at every output position, not in
    the patches, so these factors do not explain it, and it is left to the nominal term.
    """

    parameter_names = ("weight",)

    def select_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the first argument, positional or called ``input``."""
        return args[0] if args else kwargs["input"]

    def activations(self, module: nn.Module, layer_input: Tensor) -> Tensor:
        """Return the input (b, positions, channels)."""
        return channels_last(layer_input, len(module.kernel_size))

    def backprops(self, module: nn.Module, output_gradient: Tensor) -> Tensor:
        """Return the patches of the output's gradient (b, positions, channels * taps)."""
        batched = output_gradient if output_gradient.dim() == len(module.kernel_size) + 2 else output_gradient[None]
        windows = sliding_windows(self._aligned(module, batched), module.kernel_size, module.stride, module.dilation)
        return windows_at(windows, len(module.kernel_size), None)

    def widths(self, module: nn.Module) -> tuple[int, int]:
        """Return input channels, and output channels times taps."""
        return module.in_channels, module.out_channels * math.prod(module.kernel_size)

    def groups(self, module: nn.Module) -> int:
        """Return the groups of channels."""
        return module.groups

    def weight_order(self, module: nn.Module) -> WeightOrder:
        """Return the order of (groups, inputs, outputs, *taps) in memory."""
        groups, taps = module.groups, tuple(module.kernel_size)
        sizes = (groups, module.in_channels // groups, module.out_channels // groups, *taps)
        return WeightOrder(sizes, (0, *range(2, len(sizes)), 1))

    def neuron_axis(self, module: nn.Module) -> int:
        """Return the axis of channels, counted from the end."""
        return -1 - len(module.kernel_size)

    def output_neurons(self, module: nn.Module) -> Tensor:
        """Return each channel once for every tap."""
        return torch.arange(module.out_channels).repeat_interleave(math.prod(module.kernel_size))

    def _aligned(self, module: nn.Module, gradient: Tensor) -> Tensor:
        """Return the output's gradient such that each input position's patch starts a stride after the last."""
        padded = functional.pad(gradient, [side for p in reversed(module.padding) for side in (p, p)])
        # output_padding adds places that no patch reaches
        spare = [-extra for extra in reversed(module.output_padding)]
        return functional.pad(padded, [side for extra in spare for side in (0, extra)])


def channels_last(tensor: Tensor, spatial: int) -> Tensor:
    """Return (b, c, ...) or (c, ...) with so many spatial axes as (b, positions, c)."""
    if spatial == 0:
        return tensor.unsqueeze(1)
    batched = tensor if tensor.dim() == spatial + 2 else tensor.unsqueeze(0)
    return batched.flatten(2).mT


def sliding_windows(
    padded: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> Tensor:
    """Return the patches of (b, c, ...) as a view (b, c, *positions, *taps)."""
    windows = padded
    for axis, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True)):
        windows = windows.unfold(2 + axis, gap * (size - 1) + 1, step)[..., ::gap]
    return windows


def windows_at(windows: Tensor, spatial: int, positions: Tensor | None) -> Tensor:
    """Return windows (b, c, *positions, *taps) at some positions, or all, as (b, q, c * taps)."""
    moved = windows.movedim(1, 1 + spatial)  # (b, *positions, c, *taps)
    if positions is None:
        return moved.flatten(1 + spatial).flatten(1, spatial)
    places = torch.unravel_index(positions, moved.shape[1 : 1 + spatial])
    return moved[(slice(None), *places)].flatten(2)
