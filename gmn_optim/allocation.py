"""Memory that a step gives back and asks for again: glibc is made to keep it."""

import functools

import torch

LARGEST_ADAPTIVE_BLOCK = 30 * 2**20
"""Bytes. glibc adapts to freed blocks of up to 32 MiB."""


@functools.cache
def keep_freed_memory() -> None:
    """Let the C library keep up to about 60 MiB of freed memory for the next step, once for each process.

    A step makes and frees tensors of a few megabytes. glibc would return them to the system whenever more than 128 KiB
    at the end of its heap are free, and every step would fault the same pages in again, which can take a good part of
    its time. It stops doing so for sizes up to twice that of the largest block it has seen freed, so one is freed here;
    it is never written, and takes no memory. Other C libraries do nothing, and neither does glibc where its environment
    variables ``MALLOC_TRIM_THRESHOLD_`` or ``MALLOC_MMAP_THRESHOLD_`` say what to do.

    Reference:
        mallopt(3), ``M_MMAP_THRESHOLD``, on the dynamic threshold.

    Example:
        >>> keep_freed_memory()
    """
    torch.empty(LARGEST_ADAPTIVE_BLOCK, dtype=torch.uint8, device="cpu")
