"""The memory of this machine, or of the container that this process runs in, and a limit on what it takes."""

import contextlib
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Limit files of cgroup v2, which has "max" for no limit, and v1, which then has a number larger than any machine's."""
MEMINFO = Path("/proc/meminfo")
STATM = Path("/proc/self/statm")
_one_at_a_time = threading.RLock()


def machine_bytes() -> int:
    """Return the memory that this process may use, in bytes: the machine's, or the container's limit if lower."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [path.read_text(encoding="ascii").strip() for path in CGROUP_LIMITS if path.is_file()]
    return min([physical, *(int(limit) for limit in limits if limit.isdigit())])


def available_bytes() -> int:
    """Return the bytes that this process may still take: the machine's free memory, at most the container's limit."""
    if MEMINFO.is_file():
        for line in MEMINFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return min(int(line.split()[1]) * 1024, machine_bytes())
    return machine_bytes()


@contextlib.contextmanager
def at_most(more_bytes: int) -> Iterator[None]:
    """Let this process take `more_bytes` more memory, all threads together; more raises MemoryError.

    Without a limit, the kernel kills this process or another one when memory runs out, and no error says what was too
    large. Memory counts once it is writable (RLIMIT_DATA), used or not. Where the amount is unknown, as outside Linux,
    there is no limit. A thread waits for another one's limit to end: of two that overlap, one would stay for good.
    """
    if not STATM.is_file():
        yield
        return
    with _one_at_a_time:
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        taken = int(STATM.read_text(encoding="ascii").split()[5]) * os.sysconf("SC_PAGE_SIZE")
        limits = [limit for limit in (taken + more_bytes, soft, hard) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
