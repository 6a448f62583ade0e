"""``nn.MultiheadAttention``: the packed in-projection; its products are found in the graph, not at a module."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gmn_optim.capture.adapters import register_layer
from gmn_optim.capture.linear import LinearAdapter


@register_layer(nn.MultiheadAttention)
class AttentionAdapter(LinearAdapter):
    """Queries, keys and values (b, p, i) against one weight (3 i, i); the out-projection is a linear layer of its own.

    With ``kdim`` or ``vdim`` there is no packed weight, and only the out-projection is served.
    """

    parameter_names = ("in_proj_weight", "in_proj_bias")

    def select_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the queries."""
        return args[0] if args else kwargs["query"]

    def select_inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """Return queries, keys and values."""
        bound = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs)
        return bound["query"], bound["key"], bound["value"]

    def widths(self, module: nn.Module) -> tuple[int, int]:
        """Return the width of the queries, and three times that."""
        return module.embed_dim, 3 * module.embed_dim
