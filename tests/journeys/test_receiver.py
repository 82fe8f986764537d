"""A person promotes a version while the notified receiver never ends its answer, or ends it with 400 MB.

The version is one that a release wrote (tests/frozen), the receivers are sockets on loopback, and the judge is the
kernel: how long the command's process lived, and its largest resident set (proc(5), VmHWM).
"""

import contextlib
import re
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread

import pytest

from tests.frozen import registry
from tests.journeys.bucket import Bucket
from tests.journeys.conftest import Person

pytestmark = [pytest.mark.e2e]

LONGEST_S = 120
"""Four times what the command gives a receiver; then it is killed."""
LARGEST_MIB = 400
"""The command alone takes some 130."""
MB = 2**20
PLACE = " ".join(registry.PLACE)


@dataclass(frozen=True)
class Ended:
    exit_code: int
    screen: str
    seconds: float
    mib: float


def ends(person: Person, line: str) -> Ended:
    """One command, run as the one process that the kernel then tells of.

    Not by getrusage: that of a process which a larger one has started begins with the larger one's.
    """
    began, most = time.monotonic(), 0
    with tempfile.TemporaryFile("w+") as screen:
        process = person.starts(line, stdout=screen, stderr=screen)
        while process.poll() is None:
            if time.monotonic() - began > LONGEST_S:
                process.kill()
            status = Path(f"/proc/{process.pid}/status").read_text()  # there until `poll` has seen the end
            most = max([most, *(int(found) for found in re.findall(r"VmHWM:\s+(\d+) kB", status))])
            time.sleep(0.01)
        screen.seek(0)
        return Ended(process.returncode, screen.read(), time.monotonic() - began, most / 1024)


@contextlib.contextmanager
def receiving(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """An address whose every caller is read once and then answered so."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                caller, _ = server.accept()
                Thread(target=answered, args=(caller,), daemon=True).start()

    def answered(caller: socket.socket) -> None:
        with caller, contextlib.suppress(OSError):
            caller.recv(65536)
            answer(caller)

    with socket.create_server(("127.0.0.1", 0)) as server:
        Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def dripping(caller: socket.socket, beginning: bytes) -> None:
    caller.sendall(beginning)
    while True:
        caller.sendall(b"a")
        time.sleep(2)


def huge(caller: socket.socket, status: str) -> None:
    caller.sendall(f"HTTP/1.1 {status}\r\nContent-Length: {400 * MB}\r\n\r\n".encode())
    for _ in range(400):
        caller.sendall(b"x" * MB)


@pytest.fixture(scope="module")
def owner(person: Person) -> Person:
    """Somebody whose store holds what a release left in it."""
    s3 = Bucket.of(person).client
    s3.create_bucket(Bucket=registry.BUCKET)
    folder = registry.HERE / registry.RELEASES[0] / "registry"
    for path in folder.rglob("*"):
        if path.is_file():
            key = f"{registry.PREFIX}/{path.relative_to(folder).as_posix()}"
            s3.put_object(Bucket=registry.BUCKET, Key=key, Body=path.read_bytes())
    return person


@pytest.mark.full
def test_a_promotion_ends_though_its_receiver_sends_a_byte_now_and_then(owner: Person) -> None:
    beginnings = {
        "slow-head": b"HTTP/1.1 200 OK\r\nX-Slow: ",
        "slow-body": b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n",
    }

    def promoted(alias: str) -> Ended:
        with receiving(partial(dripping, beginning=beginnings[alias])) as url:
            announced = f"--set announce.mlflow={url}"
            return ends(owner, f"fineloop adapters promote colours@production --alias {alias} {PLACE} {announced}")

    with ThreadPoolExecutor() as pool:
        found = dict(zip(beginnings, pool.map(promoted, beginnings), strict=True))
    for alias, ended in found.items():
        assert ended.exit_code == 0, ended
        assert "announce.mlflow was not notified" in ended.screen
        assert f"fineloop adapters announce colours@{alias}" in ended.screen
        assert alias in owner.does(f"fineloop adapters show colours@{alias} {PLACE}").stdout


@pytest.mark.parametrize("status", ["500 Internal Server Error", pytest.param("200 OK", marks=pytest.mark.full)])
def test_an_answer_of_400_mb_takes_neither_memory_nor_time(owner: Person, status: str) -> None:
    with receiving(partial(huge, status=status)) as url:
        ended = ends(owner, f"fineloop adapters announce colours@production {PLACE} --set announce.mlflow={url}")
    assert ended.exit_code == 1, ended.screen
    assert "xxxx" in ended.screen
    assert ended.mib < LARGEST_MIB, ended
