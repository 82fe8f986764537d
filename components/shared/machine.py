"""This machine and this process: the processor, memory, the account, the environment."""

import contextlib
import os
import platform
import pwd
import resource
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# The processor that this process runs on, and how fast its instructions are at bfloat16.

CPUINFO = Path("/proc/cpuinfo")
# Flags of /proc/cpuinfo and the kinds they show, fastest at bfloat16 first: a processor's first match counts.
X86 = (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512 BF16"), ("avx512f", "AVX-512"), ("avx2", "AVX2"))
ARM = (("bf16", "ARM with BF16"), ("asimd", "ARM"))
KINDS = {"x86_64": X86, "AMD64": X86, "aarch64": ARM, "arm64": ARM}


@dataclass(frozen=True)
class Cpu:
    """A processor, described for people."""

    name: str
    """The maker's name for it; the architecture if there is none."""
    kind: str
    """AMX, AVX-512 BF16, AVX-512, AVX2, ARM with BF16, ARM, or else the architecture."""
    cores: int
    """The number of cores that this process may use."""

    @property
    def summary(self) -> str:
        return f"{self.cores} core{'s' * (self.cores != 1)} of {self.name}, {self.kind}"


def this_cpu() -> Cpu:
    """The processor of this machine."""
    machine = platform.machine()
    text = CPUINFO.read_text(encoding="utf-8", errors="replace") if CPUINFO.is_file() else ""
    return cpu_of(text, machine=machine, cores=usable_cores())


def cpu_of(cpuinfo: str, *, machine: str, cores: int) -> Cpu:
    """The processor that /proc/cpuinfo describes; pure."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    kind = next((kind for flag, kind in KINDS.get(machine, ()) if flag in flags), machine)
    return Cpu(fields.get("model name") or machine, kind, cores)


def usable_cores() -> int:
    """The number of cores that the scheduler gives this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# The memory of this machine, or of the container that this process runs in, and a limit on what it takes.

CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Limit files of cgroup v2, which has "max" for no limit, and v1, which then has a number larger than any machine's."""
MEMINFO = Path("/proc/meminfo")
STATM = Path("/proc/self/statm")
_one_at_a_time = threading.RLock()


def machine_bytes() -> int:
    """The memory that this process may use: the machine's, or the container's limit if lower."""
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


def account(environment: Mapping[str, str]) -> str:
    """The name of the person or service: FINELOOP_USER if a deployment sets it, else the login. Cron and containers
    leave the login out of the environment, so the machine is asked for it; empty if it knows no name either."""
    if named := next(filter(None, map(environment.get, ("FINELOOP_USER", "USER", "LOGNAME"))), ""):
        return named
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(os.getuid()).pw_name
    return ""


@contextlib.contextmanager
def in_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set `variables` until the `with` ends, then restore their earlier values, or unset them."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def replaced(owner: object, **values: object) -> Iterator[None]:
    """Set attributes of `owner`, such as a library's functions, until the `with` ends."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def ran_low(text: str) -> str:
    """Say what to do where Ray reports that it ended processes because their node ran out of memory, else nothing.

    Ray's own fifty lines show the arguments of other programs, which not every reader of a report may see.
    """
    if "killed due to the node running low on memory" not in text:
        return ""
    return (
        "a node ran out of memory, and Ray ended processes of the run there. End other programs there, lower "
        "train.micro_batch_size or ray.num_workers, or give its pods more (ray.cluster.worker.memory_gib)"
    )
