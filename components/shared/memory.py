"""How much memory this machine, or the container that we run in, has, and a limit to what this process takes of it."""

import contextlib
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Of version 2, which says "max" for none, and of version 1, which then gives a number larger than any machine."""
MEMINFO = Path("/proc/meminfo")
STATM = Path("/proc/self/statm")
_one_at_a_time = threading.RLock()


def machine_bytes() -> int:
    """The memory that this process may use: the machine's, or less where its container is limited."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [path.read_text(encoding="ascii").strip() for path in CGROUP_LIMITS if path.is_file()]
    return min([physical, *(int(limit) for limit in limits if limit.isdigit())])


def available_bytes() -> int:
    """Memory that this process may still take: what the machine has free, at most what the container may hold."""
    if MEMINFO.is_file():
        for line in MEMINFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return min(int(line.split()[1]) * 1024, machine_bytes())
    return machine_bytes()


@contextlib.contextmanager
def at_most(more_bytes: int) -> Iterator[None]:
    """Let this process take this much more memory, all threads together; more raises MemoryError.

    Without it the kernel ends a process that takes all there is, or another one, and no error says what was too large.
    Memory counts once it may be written to (RLIMIT_DATA), used or not. Where that is not known, as outside Linux,
    there is no limit. A thread waits for another's to end: of two that overlap, one would be put back for good.
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
