"""Somebody interrupts a run, or its machine does: what they read, what is left behind, and how the run goes on.

They work at a terminal, with a home that was there already. The judges are the kernel's: /proc says what still runs and
listens, and the temporary directory is theirs alone. That a run went on as if nothing had been is judged by an
undisturbed one in another home: a version's id is a hash of its bytes.
"""

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import tempfile
import termios
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.journeys.conftest import Person
from tests.waiting import PATIENCE_S, wait_until

pytestmark = [pytest.mark.e2e]

RUN = "fineloop run -c colours.toml --set train.checkpoint_every_steps=5 --set train.epochs=8 --json"
PREPARES, LOADS, COMPARES = r"prepare +\d", r"finetune .*data s3://", r"evaluate +\d"
TRAINS = r"(?s)step-\d+/shared.*step-\d+/shared"
"""On the screen once there is a further checkpoint to go on from."""
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a disk, which takes root")


@dataclass(frozen=True)
class Traveller(Person):
    """A person whose processes bear a mark, and who alone uses a temporary directory."""

    @property
    def mark(self) -> str:
        return self.variables["JOURNEY"]

    def left(self) -> dict[int, str]:
        """Processes that inherited the mark: their ids and command lines."""
        commands = {}
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if f"JOURNEY={self.mark}".encode() in environ.read_bytes().split(b"\0"):
                    command = environ.with_name("cmdline").read_text()
                    commands[int(environ.parent.name)] = command.replace("\0", " ")
        return commands

    def process(self, *words: str) -> int:
        """The id of the one whose command line holds all of these; its guard's does too."""
        found = {pid: command for pid, command in self.left().items() if "guard.py" not in command}
        return next(pid for pid, command in found.items() if all(word in command for word in words))

    def ports(self, home: str) -> set[int]:
        return {port for path in (self.folder / home).glob("*/ports.json") for port in json.loads(path.read_text())}

    def listens(self, home: str) -> set[int]:
        """Ports of this home's servers that somebody listens on: state 0A in /proc/net/tcp."""
        lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
        return self.ports(home) & {int(line.split()[1].split(":")[1], 16) for line in lines if line.split()[3] == "0A"}

    def leaves_nothing(self, home: str) -> None:
        """Neither process nor port, nor a file outside the home."""
        assert self.left() == {}
        assert self.listens(home) == set()
        assert list(Path(self.variables["TMPDIR"]).iterdir()) == []
        ports = self.ports(home)
        assert not [path for path in Path("/tmp").glob("seaweedfs-*.sock") if int(path.stem.split("-")[-1]) in ports]


class Terminal:
    """A command in the foreground of a terminal of its own, and all that the terminal shows."""

    def __init__(self, person: Traveller, line: str) -> None:
        self.screen = ""
        self._hand, other = pty.openpty()
        shown = {"stdin": other, "stdout": subprocess.PIPE, "stderr": other}
        session = {"start_new_session": True, "preexec_fn": lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)}
        environment = {**person.environment, "TERM": "xterm", "COLUMNS": "160"}
        self.process = person.starts(line, env=environment, **shown, **session)
        os.close(other)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def shows(self, pattern: str) -> None:
        try:
            wait_until(lambda: re.search(pattern, self.screen) or self.process.poll() is not None)
            assert self.process.poll() is None, self.screen
        except AssertionError:
            self.process.kill()
            self.ends()
            raise

    def ctrl_c(self) -> None:
        """The key: the terminal's driver sends SIGINT to all of the foreground."""
        os.write(self._hand, b"\x03")

    def ends(self) -> tuple[int, str]:
        with self.process.stdout:
            out = self.process.stdout.read()
        code = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return code, out.decode()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # EIO: nobody has the other end any more
            while chunk := os.read(self._hand, 4096):
                self.screen += chunk.decode(errors="replace")
        os.close(self._hand)


@pytest.fixture(scope="module")
def somebody() -> Iterator[Traveller]:
    """In a folder that others may enter, unlike pytest's, and with a temporary directory short enough for sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="w") as folder, tempfile.TemporaryDirectory(dir="/tmp") as tmp:
        Path(folder).chmod(0o755)
        found = Traveller(Path(folder), {"TMPDIR": tmp, "JOURNEY": uuid.uuid4().hex})
        found.has_colours(rows=1200)
        yield found
        wait_until(lambda: not found.left())


@pytest.fixture(scope="module")
def undisturbed(somebody: Traveller) -> str:
    """The version that the run makes when nothing happens."""
    return somebody.does(f"{RUN} --home undisturbed").answer["version"]


def test_at_ctrl_c_while_servers_start_the_prompt_comes_back_when_nothing_runs(somebody: Traveller) -> None:
    at = Terminal(somebody, f"{RUN} --home starting")
    wait_until(lambda: any(" mini " in command for command in somebody.left().values()))
    at.ctrl_c()
    code, _ = at.ends()
    somebody.leaves_nothing("starting")
    assert code == 130
    assert "interrupted: nothing of this command is left running" in at.screen
    assert "Traceback" not in at.screen


KILLED = "its process was ended by SIGKILL"
STORE, HEAD = (f"the local {server} ended while it was in use" for server in ("S3 server", "Ray head"))
CTRL_C, KILL, DISK = "ctrl-c", "kill", "disk"
STRIKES = [
    *((shown, CTRL_C, "") for shown in (PREPARES, LOADS, TRAINS)),
    (TRAINS, "pipelines.local.run_pipeline", KILLED),
    (TRAINS, "/weed -logtostderr=true mini", STORE),
    (TRAINS, "/raylet/raylet ", HEAD),
    *((shown, KILL, "") for shown in (PREPARES, TRAINS)),
    pytest.param(TRAINS, DISK, r"the disk of \S+ is full|No space left on device", marks=AS_ROOT),
    (COMPARES, CTRL_C, ""),
    (COMPARES, KILL, ""),
]
"""What the screen shows, who is struck then, and what the screen says of it."""


@pytest.fixture(scope="module")
def course(somebody: Traveller) -> Iterator[list[str]]:
    """The line that goes on with one run, interrupted again and again: each test types what the screen said before. Its
    home is a small disk of its own, where somebody may mount one."""
    disk = somebody.folder / "disk"
    disk.mkdir()
    if os.geteuid() == 0:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120m", "none", str(disk)], check=True)
    yield [f"{RUN} --home disk/home --run-id mine"]
    if os.geteuid() == 0:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def begins(person: Traveller, course: list[str], shown: str) -> Terminal:
    wait_until(lambda: not person.left())  # servers end a little later than what used them
    at = Terminal(person, course[-1])
    at.shows(shown)
    return at


def names_the_resume_command(at: Terminal, course: list[str]) -> None:
    assert "Traceback" not in at.screen
    (resume,) = re.findall(r"to go on from where it was: (fineloop run .*?)\r?\n", at.screen)
    course.append(f"{resume} --json")


@pytest.mark.full
@pytest.mark.parametrize(("shown", "victim", "message"), STRIKES)
def test_whatever_is_struck_nothing_is_left_and_the_screen_says_how_to_go_on(
    somebody: Traveller, course: list[str], shown: str, victim: str, message: str
) -> None:
    at = begins(somebody, course, shown)
    if victim == KILL:
        second = somebody.types(course[-1])
        at.process.kill()
        at.ends()
        wait_until(lambda: not somebody.left())
        assert second.exit_code == 2
        refusal = r"fineloop: run \S+ is under way in another process: wait for its end, or take another --run-id\n"
        assert re.fullmatch(refusal, second.screen)
        return
    if victim == CTRL_C:
        at.ctrl_c()
        code, _ = at.ends()
        somebody.leaves_nothing("disk/home")
        assert code == 130, at.screen
        assert "interrupted: nothing of this command is left running" in at.screen
    else:
        filler = somebody.folder / "disk" / "filler"
        if victim == DISK:
            filled = subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=4k"], capture_output=True, check=False)
            assert filled.returncode == 1  # no space left
        else:
            os.kill(somebody.process(victim), signal.SIGKILL)
        code, out = at.ends()
        filler.unlink(missing_ok=True)
        assert code == 1, at.screen
        assert re.search(message, at.screen)
        assert json.loads(out.splitlines()[-1])["exit_code"] == 1
        wait_until(lambda: not somebody.left())
        somebody.leaves_nothing("disk/home")
    names_the_resume_command(at, course)


@pytest.mark.full
def test_after_all_of_this_the_run_makes_the_version_of_an_undisturbed_one(
    somebody: Traveller, course: list[str], undisturbed: str
) -> None:
    wait_until(lambda: not somebody.left())
    done = somebody.does(course[-1]).answer
    assert (done["version"], done["promoted"], done["run_id"] in course[-1]) == (undisturbed, True, True)
    again = somebody.does(course[-1]).answer
    assert (again["version"], again["promoted"]) == (undisturbed, True)  # as it was decided, and nothing moved anew
    wait_until(lambda: not somebody.left())
    somebody.leaves_nothing("disk/home")  # what a killed one left in the temporary directory went with a later one
