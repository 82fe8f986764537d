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

GIVEN_BACK = """
import torch
from ray_jobs.training import allocator

def resident():  # proc(5), statm, in pages of 4 KiB
    return int(open("/proc/self/statm").read().split()[1]) * 4096

allocator.keep_freed_memory()
before = resident()
blocks = [torch.ones(2**20) for _ in range(64)]
del blocks
kept = resident() - before
allocator.give_back()
print(kept, resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that gives memory back")
@pytest.mark.slow
def test_memory_that_was_freed_is_not_asked_for_again() -> None:
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("as it is") > 5 * faults("keep")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that keeps memory")
@pytest.mark.slow
def test_memory_that_was_kept_is_given_back_where_it_is_not_needed_again() -> None:
    done = subprocess.run([sys.executable, "-c", GIVEN_BACK], capture_output=True, text=True, check=True)
    kept, left = map(int, done.stdout.split())
    assert kept > 200 * 2**20 > 20 * left
