"""Meta-parameters that meta-training leaves as they are."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from gmn_optim.errors import InvalidArgumentError
from gmn_optim.metatrain.unroll import Meta


def trainable_mask(meta: Meta, frozen: Sequence[str]) -> Tensor:
    """Return 1 for every element of the flat meta-parameters that is trained, 0 for a frozen one (m).

    Args:
        meta: Meta-parameters by name.
        frozen: Shell-style patterns of names.

    Raises:
        InvalidArgumentError: a pattern fits no name, or nothing is left to train.

    Example:
        >>> trainable_mask({"alpha.raw": torch.zeros(()), "body.weight": torch.zeros(2)}, ["alpha.*"])
        tensor([0., 1., 1.])
    """
    if idle := [pattern for pattern in frozen if not any(fnmatchcase(name, pattern) for name in meta)]:
        raise InvalidArgumentError(f"frozen patterns {idle} fit no meta-parameter; there are {', '.join(meta)}")
    held = {name: any(fnmatchcase(name, pattern) for pattern in frozen) for name in meta}
    if all(held.values()):
        raise InvalidArgumentError(f"frozen = {list(frozen)} leaves nothing to train; leave a pattern out")
    return torch.cat([torch.full_like(value, 1.0 - held[name]).reshape(-1) for name, value in meta.items()])
