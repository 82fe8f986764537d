"""What the kernel says of a process that takes and frees the same memory again and again."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from ray_jobs.training import allocator

if sys.argv[1] == "keep":
    allocator.keep_freed_memory()
blocks = lambda: [torch.zeros(2**22) for _ in range(4)]
blocks()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    blocks()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that gives memory back")
def test_memory_that_was_freed_is_not_asked_for_again() -> None:
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("as it is") > 5 * faults("keep")
