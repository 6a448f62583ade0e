"""Embeddings: a table whose rows are looked up; the gradient adds each backprop to the row that was read."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gmn_optim.capture.adapters import AbstractLayerAdapter, ProbeTerms, register_layer
from gmn_optim.capture.linear import with_positions
from gmn_optim.capture.rows import EVERY_ROW, RowChoice
from gmn_optim.gradients import DecomposedGradient
from gmn_optim.neurons import LayerSpec


@register_layer(nn.Embedding)
class EmbeddingAdapter(AbstractLayerAdapter):
    """``nn.Embedding``, its activations being the row numbers (b, p, 1), never one-hot vectors.

    As a matrix the table stands as in memory, (rows, o). Sparse gradients and gradients divided by how often a row
    was read are not served.
    """

    parameter_names = ("weight",)
    structure = "table"

    def supports(self, module: nn.Module) -> bool:
        """Whether gradients are dense and plain sums."""
        return not (module.sparse or module.scale_grad_by_freq)

    def select_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the row numbers, positional or called ``input``."""
        return args[0] if args else kwargs["input"]

    def activations(self, module: nn.Module, layer_input: Tensor) -> Tensor:
        """Return the row numbers (b, p, 1)."""
        return with_positions(layer_input.unsqueeze(-1))

    def backprops(self, module: nn.Module, output_gradient: Tensor) -> Tensor:
        """Return the gradient of the output (b, p, o)."""
        return with_positions(output_gradient)

    def widths(self, module: nn.Module) -> tuple[int, int]:
        """Return one input neuron, which stands for all rows, and the table's width."""
        return 1, module.embedding_dim

    def spec(self, module: nn.Module) -> LayerSpec:
        """Return the form of the layer, with its number of rows."""
        return super().spec(module)._replace(rows=module.num_embeddings)

    def decompose(
        self, module: nn.Module, layer_input: Tensor, output_gradient: Tensor, rows: RowChoice = EVERY_ROW
    ) -> DecomposedGradient:
        """Return the factors, without a gradient where the padding was read."""
        activations, backprops = super().decompose(module, layer_input, output_gradient, rows)
        if module.padding_idx is None:
            return DecomposedGradient(activations, backprops)
        return DecomposedGradient(activations, backprops * (activations != module.padding_idx))

    def recompose(self, module: nn.Module, gradient: DecomposedGradient) -> dict[str, Tensor]:
        """Return the gradient of the table (rows, o)."""
        rows, backprops = gradient.activations.flatten(), gradient.backprops.flatten(0, 1)
        empty = backprops.new_zeros(module.num_embeddings, backprops.shape[1])
        return {"weight": empty.index_add(0, rows, backprops)}

    def gradient_matrix(self, module: nn.Module, gradient: Tensor) -> Tensor:
        """Return the gradient as it is (rows, o)."""
        return gradient

    def probe(self, module: nn.Module, layer_input: Tensor, output_gradient: Tensor, probes: Tensor) -> ProbeTerms:
        """Return the sum over rows read of ``g . v`` (rows, k)."""
        activations, backprops = self.decompose(module, layer_input, output_gradient)
        along = backprops.flatten(0, 1) @ probes
        product = along.new_zeros(module.num_embeddings, along.shape[1])
        return ProbeTerms(product.index_add(0, activations.flatten(), along), torch.linalg.vector_norm(along))


@register_layer(nn.EmbeddingBag)
class EmbeddingBagAdapter(EmbeddingAdapter):
    """``nn.EmbeddingBag`` with bags of equal size (b, p), summed or averaged; other bags are not served."""

    def supports(self, module: nn.Module) -> bool:
        """Whether gradients are dense, plain sums or means."""
        return super().supports(module) and module.mode in ("sum", "mean")

    def select_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the row numbers (b, p); with offsets or weights of their own they are given without data points."""
        bound = dict(zip(("input", "offsets", "per_sample_weights"), args, strict=False)) | dict(kwargs)
        is_plain = bound.get("offsets") is None and bound.get("per_sample_weights") is None
        return bound["input"] if is_plain and bound["input"].dim() == 2 else bound["input"].flatten()[:0]

    def decompose(
        self, module: nn.Module, layer_input: Tensor, output_gradient: Tensor, rows: RowChoice = EVERY_ROW
    ) -> DecomposedGradient:
        """Return the factors, each bag's backprop at all of its rows."""
        return super().decompose(module, layer_input, self._spread(module, layer_input, output_gradient), rows)

    def rows_of(self, module: nn.Module, layer_input: Tensor, output_gradient: Tensor) -> tuple[int, int]:
        """Return bags, and rows of each."""
        return layer_input.shape if layer_input.dim() == 2 else (0, 1)

    def _spread(self, module: nn.Module, rows: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient of every row that was read (b, p, o)."""
        if rows.dim() < 2:
            return gradient.new_zeros(0, 1, gradient.shape[-1])
        spread = gradient.unsqueeze(1).expand(-1, rows.shape[1], -1)
        if module.mode == "sum":
            return spread
        counted = (
            (rows != module.padding_idx).sum(1) if module.padding_idx is not None else rows.new_tensor(rows.shape[1])
        )
        return spread / counted.clamp_min(1).view(-1, 1, 1)
