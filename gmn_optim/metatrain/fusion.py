"""Fusing a vmapped step into few compiled loops."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree

Result = TypeVar("Result")


def fuse(function: Callable[..., Result], example: tuple[Any, ...]) -> Callable[..., Result]:
    """Return ``function`` traced to plain tensor operations and compiled, for arguments shaped like ``example``.

    Tracing first takes ``vmap``, ``grad``, module calls and hooks out of the compiler's sight: it is given nothing but
    operations on tensors.

    Args:
        function: A pure function of trees of tensors.
        example: Arguments; their shapes are fixed from then on.
    """
    leaves, inputs = _pytree.tree_flatten(example)
    outputs: list[_pytree.TreeSpec] = []

    def on_leaves(*leaves: torch.Tensor) -> list[Any]:
        results, spec = _pytree.tree_flatten(function(*_pytree.tree_unflatten(list(leaves), inputs)))
        outputs.append(spec)
        return results

    compiled = torch.compile(make_fx(on_leaves)(*leaves), dynamic=False)

    def fused(*arguments: Any) -> Result:
        return _pytree.tree_unflatten(compiled(*_pytree.tree_leaves(arguments)), outputs[0])

    return fused
