"""This machine and process. Processors are those of what Linux says of real ones, cut to the flags that differ."""

import os
import resource
import subprocess
import threading
import time
from pathlib import Path

import pytest

from components.shared import machine
from components.shared.machine import Cpu, account, cpu_of, in_environment, this_cpu

X86 = "processor\t: 0\nmodel name\t: Xeon\nflags\t\t: fpu sse2 {}\n"
ARM = "processor\t: 0\nBogoMIPS\t: 2100.00\nFeatures\t: fp asimd evtstrm {}\nCPU implementer\t: 0x41\n"


@pytest.mark.parametrize(
    ("cpuinfo", "machine", "kind", "name"),
    [
        pytest.param(X86.format("avx2 avx512f avx512_bf16 amx_bf16"), "x86_64", "AMX", "Xeon", id="Sapphire Rapids"),
        pytest.param(X86.format("avx2 avx512f avx512_bf16"), "x86_64", "AVX-512 BF16", "Xeon", id="Zen 4"),
        pytest.param(X86.format("avx2 fma avx512f avx512_vnni"), "x86_64", "AVX-512", "Xeon", id="Cascade Lake"),
        pytest.param(X86.format("avx2 fma vaes"), "x86_64", "AVX2", "Xeon", id="Zen 3"),
        pytest.param(ARM.format("svebf16 i8mm bf16"), "aarch64", "ARM with BF16", "aarch64", id="Graviton 3"),
        pytest.param(ARM.format("asimdhp"), "aarch64", "ARM", "aarch64", id="Graviton 2"),
        ("", "x86_64", "x86_64", "x86_64"),
        ("", "riscv64", "riscv64", "riscv64"),
    ],
)
def test_a_processor_is_named_by_what_it_makes_of_bfloat16(cpuinfo: str, machine: str, kind: str, name: str) -> None:
    assert cpu_of(cpuinfo, machine=machine, cores=2) == Cpu(name, kind, 2)
    assert this_cpu().cores >= 1


def test_the_environment_names_who_works_here_and_else_the_machine_does() -> None:
    assert account({"FINELOOP_USER": "ann", "USER": "bob"}) == "ann"
    assert account({"USER": "", "LOGNAME": "bob"}) == "bob"
    assert account({}) == subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()


def test_variables_are_set_inside_and_as_before_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELD", "before")
    monkeypatch.delenv("UNSET", raising=False)
    with in_environment({"HELD": "inside"}):
        assert os.environ["HELD"] == "inside"
    assert os.environ["HELD"] == "before"
    with pytest.raises(KeyError), in_environment({"HELD": "inside", "UNSET": "inside"}):
        raise KeyError
    assert os.environ["HELD"] == "before"
    assert "UNSET" not in os.environ
    with in_environment({"UNSET": "inside"}):
        del os.environ["UNSET"]  # as whoever runs inside may
    assert "UNSET" not in os.environ


# A container's limit, as the kernel writes it: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.


MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
NO_LIMIT_V1 = "9223372036854771712"
"""PAGE_COUNTER_MAX of 64-bit kernels (include/linux/page_counter.h), in bytes."""


@pytest.mark.parametrize("file", ["memory.max", "memory.limit_in_bytes"])
@pytest.mark.parametrize(
    ("written", "expected"), [("1073741824", 2**30), ("max", MACHINE), (NO_LIMIT_V1, MACHINE), ("", MACHINE)]
)
def test_a_containers_limit_counts_in_either_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, written: str, expected: int
) -> None:
    places = (tmp_path / "memory.max", tmp_path / "memory.limit_in_bytes")
    monkeypatch.setattr(machine, "CGROUP_LIMITS", places)
    if written:
        (tmp_path / file).write_text(f"{written}\n", encoding="ascii")
    assert machine.machine_bytes() == expected


def test_more_than_what_is_left_is_a_memory_error_and_afterwards_there_is_no_limit() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with machine.at_most(256 * 2**20):
        assert len(bytearray(64 * 2**20)) == 64 * 2**20
        with pytest.raises(MemoryError):
            bytearray(512 * 2**20)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert len(bytearray(512 * 2**20)) == 512 * 2**20


def test_a_limit_within_a_limit_does_not_raise_it() -> None:
    with machine.at_most(128 * 2**20), machine.at_most(1024 * 2**20), pytest.raises(MemoryError):
        bytearray(512 * 2**20)


def test_limits_of_two_threads_that_overlap_leave_none_behind() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    first_is_in, first_may_leave, second_may_leave = (threading.Event() for _ in range(3))

    def first() -> None:
        with machine.at_most(512 * 2**20):
            first_is_in.set()
            first_may_leave.wait(10)

    def second() -> None:
        first_is_in.wait(10)
        with machine.at_most(512 * 2**20):
            second_may_leave.wait(10)

    threads = [threading.Thread(target=each) for each in (first, second)]
    for thread in threads:
        thread.start()
    first_is_in.wait(10)
    time.sleep(0.2)  # time for the second to be within too, if it can
    first_may_leave.set()
    threads[0].join()
    second_may_leave.set()
    threads[1].join()
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
