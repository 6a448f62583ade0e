"""How much memory an optimizer holds, by what it is for."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from gmn_optim.report import format_table


class MemoryUsage(NamedTuple):
    """Bytes that an optimizer holds; ``str()`` of it is a table that pastes into Markdown.

    Attributes:
        factors: Captured since the last step or ``zero_grad``.
        state: What is remembered from step to step: the tensors that ``state_dict()`` saves.
        meta_model: Parameters of the update rule, GradMetaNet's among them.

    Example:
        >>> print(MemoryUsage(factors=1_088, state=9_164, meta_model=4_000))
        memory     | bytes
        ---------- | ------
        factors    | 1,088
        state      | 9,164
        meta model | 4,000
        total      | 14,252
    """

    factors: int
    state: int
    meta_model: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)

    def __str__(self) -> str:
        """Return the table as text."""
        rows = [*self._asdict().items(), ("total", self.total)]
        cells = [(name.replace("_", " "), f"{size:,}") for name, size in rows]
        return format_table([("memory", "bytes"), *cells])


def count_bytes(value: Any) -> int:
    """Return the bytes of the storages behind the tensors in a value, also in mappings and iterables inside it.

    A storage that several tensors are views of counts once, and in full: so much memory do they keep alive.

    Example:
        >>> import torch
        >>> whole = torch.zeros(6)
        >>> count_bytes({"views": [whole[:2], whole.view(2, 3)], "step": 3.0})
        24
    """
    storages = (tensor.untyped_storage() for tensor in _tensors_in(value))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a value."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(entry)
