"""Freed memory stays with the process: steps after the first fault no pages in."""

import os
import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, torch
from gmn_optim.allocation import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        made = [torch.ones(300_000) for _ in range(8)]
        del made
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
faults()
print(faults())
"""
"""Mostly a hundred thousand without the call; in some processes imports have freed a large block already."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries decide otherwise")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    # in a process of its own: what the allocator has learned by now depends on the tests before
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    found = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True, env=environment)
    assert int(found.stdout) < 1_000
