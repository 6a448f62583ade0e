"""Tensors that depend on sizes alone: made once, for every mode and transform that they are used under later."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, wraps
from typing import TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


def constant(maxsize: int = 64) -> Callable[[Callable[..., Made]], Callable[..., Made]]:
    """Return a decorator that keeps the newest ``maxsize`` results of a function that makes tensors from sizes.

    What it returns is shared by all callers: read it, do not write to it. It is an ordinary tensor also when the
    first caller is in ``torch.inference_mode``, under ``torch.func``, or traced.

    Args:
        maxsize: Results to keep; the one that was used longest ago is dropped first.

    Example:
        >>> @constant(maxsize=2)
        ... def ones(size):
        ...     return torch.ones(size)
        >>> with torch.inference_mode():
        ...     ones(3).is_inference()
        False
        >>> ones(3) is ones(3)
        True
    """

    def decorate(make: Callable[..., Made]) -> Callable[..., Made]:
        @lru_cache(maxsize=maxsize)
        @wraps(make)
        def make_once(*arguments: object) -> Made:
            return _apart(make, arguments)

        return make_once

    return decorate


@constant()
def constant_tensor(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers as a tensor.

    Example:
        >>> constant_tensor((0.5, 2.0), torch.float32, torch.device("cpu"))
        tensor([0.5000, 2.0000])
    """
    return torch.tensor(values, dtype=dtype, device=device)


def _apart(make: Callable[..., Made], arguments: tuple[object, ...]) -> Made:
    """Return what ``make`` returns where no mode of the caller holds."""
    # Inference mode, transforms, tracing and default devices are entered for one thread: a new one is in none of them.
    # A tensor made in them would carry a mark of the first caller for ever, and fail later ones.
    with ThreadPoolExecutor(max_workers=1) as new_thread:
        return new_thread.submit(make, *arguments).result()
