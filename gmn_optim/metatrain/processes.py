"""Processes that share a run: who is there, and tensors of a fixed size that each lets the others see."""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gmn_optim.errors import InvalidArgumentError


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them sees them; by default there is one.

    Attributes:
        rank: Number of this process.
        count: Of all.

    Example:
        >>> Processes().gather(torch.ones(2)).shape
        torch.Size([1, 2])
    """

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Return whether this process writes what is written once."""
        return self.rank == 0

    def owner(self, slot: int) -> int:
        """Return the process that a slot is dealt to."""
        return slot % self.count

    def owns(self, slot: int) -> bool:
        """Return whether a slot is dealt to this process."""
        return self.owner(slot) == self.rank

    def gather(self, own: Tensor) -> Tensor:
        """Return the tensors of all processes, of equal shapes, stacked (count, ...)."""
        if self.count == 1:
            return own.unsqueeze(0)
        found = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(found, own.contiguous())
        return torch.stack(found)

    def agree(self, decision: bool) -> bool:
        """Return what the first process decides."""
        return bool(self.gather(torch.tensor([decision], dtype=torch.uint8))[0])

    def wait(self) -> None:
        """Return when every process is here."""
        self.agree(True)


@contextmanager
def join_processes() -> Iterator[Processes]:
    """Join the processes that ``torchrun`` started, by its environment variables; without it, be the only one.

    Losses travel as numbers on the processor, by gloo, also where NCCL serves tensors on CUDA.

    Example:
        >>> with join_processes() as processes:
        ...     processes.count
        1
    """
    if _count() == 1:
        yield Processes()
        return
    # Imported while there is a group, as optimizers do, this keeps the group for good: its threads would outlive it,
    # and one that asks for the interpreter when that has ended aborts the process.
    importlib.import_module("torch._dynamo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def require_one_process() -> None:
    """Raise if ``torchrun`` started several processes.

    Raises:
        InvalidArgumentError: it did.
    """
    if _count() > 1:
        raise InvalidArgumentError(f"{_count()} processes for one task; only a run with --family is shared")


def _count() -> int:
    """Return how many processes ``torchrun`` says there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))
