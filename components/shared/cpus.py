"""The processor that this process runs on, and how fast its instructions are at bfloat16."""

import os
import platform
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# Flags of /proc/cpuinfo and the kinds they show, fastest at bfloat16 first: a processor's first match counts.
X86 = (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512 BF16"), ("avx512f", "AVX-512"), ("avx2", "AVX2"))
ARM = (("bf16", "ARM with BF16"), ("asimd", "ARM"))


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
        """The description in one line."""
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
    return Cpu(fields.get("model name") or machine, kind_of(flags, machine=machine), cores)


def kind_of(flags: Set[str], *, machine: str) -> str:
    """The class of a processor with these flags."""
    table = X86 if machine in ("x86_64", "AMD64") else ARM if machine in ("aarch64", "arm64") else ()
    return next((kind for flag, kind in table if flag in flags), machine)


def usable_cores() -> int:
    """The number of cores that the scheduler gives this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
