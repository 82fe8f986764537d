"""What the kernel says of a process that takes and frees the same memory again and again.

The judge is mallopt(3): whatever glibc learns from a process, it maps blocks above DEFAULT_MMAP_THRESHOLD_MAX (32 MiB)
anew each time, so that each page of each block is a fault.
"""

import platform
import resource
import subprocess
import sys

import pytest

STEPS = """
import ctypes, resource, sys
import torch
from ray_jobs.kernels import door

def resident():  # proc(5), statm, in pages of 4 KiB
    return int(open("/proc/self/statm").read().split()[1]) * 4096

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a fault for each small page, also where pages are huge
if sys.argv[1] == "keep":
    door.keep_freed_memory()
def step():
    return [torch.zeros(12 * 2**20) for _ in range(4)]  # 48 MiB each

start = resident()
for _ in range(8):  # until the heap has found its places
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
faults, kept = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, resident() - start
door.give_back()
print(faults, kept, resident() - start)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that gives memory back")
@pytest.mark.slow
def test_memory_that_was_freed_is_not_asked_for_again_but_can_be_given_back() -> None:
    def found(how: str) -> list[int]:
        done = subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True)
        return [int(number) for number in done.stdout.split()]

    pages = 10 * 4 * 48 * 2**20 // resource.getpagesize()
    assert found("as it is")[0] > 0.9 * pages
    faults, kept, left = found("keep")
    assert faults < 0.1 * pages
    assert kept > 150 * 2**20 > 10 * left
