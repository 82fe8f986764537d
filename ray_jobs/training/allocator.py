"""The memory that one step frees is the next one's.

glibc gives large blocks back to the system, which hands them out again page by page, each cleared: some 2,000 faults
for each layer of the example's base in each step, a tenth of its time.
"""

import ctypes

# malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 2**31 - 1
LARGEST_BLOCK = 2**30


def keep_freed_memory() -> None:
    """From now on, in this process; nothing where the C library is not glibc. The peak stays what it was."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK)
        libc.mallopt(M_TRIM_THRESHOLD, LARGEST)
