"""A container's limit, as the kernel writes it: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst."""

import os
import resource
import threading
import time
from pathlib import Path

import pytest

from components.shared import machine

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
