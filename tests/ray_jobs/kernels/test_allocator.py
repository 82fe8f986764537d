"""What the kernel says of a process that takes and frees the same memory again and again.

The judge is mallopt(3): whatever glibc learns from a process, it maps blocks above DEFAULT_MMAP_THRESHOLD_MAX (32 MiB)
anew each time, so that each page of each block is a fault.
"""

import platform
import resource
import subprocess
import sys

import pytest

FAULTS = """
import ctypes, resource, sys
import torch
from ray_jobs.kernels import door

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a fault for each small page, also where pages are huge
if sys.argv[1] == "keep":
    door.keep_freed_memory()
def step():
    return [torch.zeros(12 * 2**20) for _ in range(4)]  # 48 MiB each

for _ in range(8):  # until the heap has found its places
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

GIVEN_BACK = """
import torch
from ray_jobs.kernels import door

def resident():  # proc(5), statm, in pages of 4 KiB
    return int(open("/proc/self/statm").read().split()[1]) * 4096

door.keep_freed_memory()
before = resident()
blocks = [torch.ones(2**20) for _ in range(64)]
del blocks
kept = resident() - before
door.give_back()
print(kept, resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that gives memory back")
@pytest.mark.slow
def test_memory_that_was_freed_is_not_asked_for_again() -> None:
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    pages = 10 * 4 * 48 * 2**20 // resource.getpagesize()
    assert faults("as it is") > 0.9 * pages
    assert faults("keep") < 0.1 * pages


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that keeps memory")
@pytest.mark.slow
def test_memory_that_was_kept_is_given_back_where_it_is_not_needed_again() -> None:
    done = subprocess.run([sys.executable, "-c", GIVEN_BACK], capture_output=True, text=True, check=True)
    kept, left = map(int, done.stdout.split())
    assert kept > 200 * 2**20 > 20 * left
