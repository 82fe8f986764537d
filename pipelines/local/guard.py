"""Runs one command so that neither it nor its descendants outlive the process that started it.

`python -I -S guard.py STDIN COMMAND...` starts the command with the descriptor STDIN as its standard input, and waits
until (a) its own standard input, a pipe from the process that started it, ends, because that process has ended in any
way; (b) it receives SIGTERM or SIGINT; or (c) the command ends. Then it ends the command with SIGTERM and after GRACE_S
by force, with all of its descendants: on Linux it is their subreaper, so that daemons in sessions of their own cannot
escape. If the guard itself is killed, the kernel sends SIGTERM to the command. A byte in the pipe sends it SIGINT.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

GRACE_S = 8.0
FORCE_S = 5.0
POLL_S = 0.02
SIGNALLED = 128  # plus the signal's number: a shell's exit status for a command that a signal ended
# linux/prctl.h
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def run(command: list[str], stdin: int) -> int:
    """Run `command` until it ends, this process gets a signal to stop, or standard input ends. Returns its exit status.
    `stdin` is the command's own standard input, a descriptor or subprocess.DEVNULL."""
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _frame: stopping.append(number))
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    guard = os.getpid()

    def die_with_guard() -> None:
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            if os.getppid() != guard:  # the guard died before the prctl call
                os._exit(1)

    # Kept until this process ends: a Popen that is dropped collects a command that has ended already, and its status.
    process = subprocess.Popen(command, stdin=stdin, start_new_session=True, preexec_fn=die_with_guard)
    child = process.pid
    while (status := _reap(child)) is None and not stopping:
        if select.select([sys.stdin], [], [], POLL_S)[0]:
            if not os.read(sys.stdin.fileno(), 4096):
                break
            os.kill(child, signal.SIGINT)
    if status is None:
        os.kill(child, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while status is None and time.monotonic() < deadline:
        time.sleep(POLL_S)
        status = _reap(child)
    deadline = time.monotonic() + FORCE_S
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)  # without /proc, nothing more can be done
    while (alive := descendants(os.getpid())) and time.monotonic() < deadline:
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S)
        _reap(child)
    return 1 if status is None else status


def _reap(main: int) -> int | None:
    """Collect every child that has ended; return the exit status of `main` if it is among them."""
    status = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == main:
                code = os.waitstatus_to_exitcode(ended[1])
                status = code if code >= 0 else SIGNALLED - code
    return status


def descendants(ancestor: int) -> set[int]:
    """Return the ids of all descendants of `ancestor`, zombies included; empty without /proc."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):  # the process has ended meanwhile
            parents[int(stat.parent.name)] = int(stat.read_text(errors="replace").rsplit(")", 1)[1].split()[1])
    family = {ancestor}
    while more := {pid for pid, parent in parents.items() if parent in family and pid not in family}:
        family |= more
    return family - {ancestor}


def start(
    command: list[str],
    *,
    environment: dict[str, str],
    directory: Path,
    stdout: int,
    stderr: int | None = subprocess.STDOUT,
    stdin: int = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Start `command` with these streams under a guard, and return the guard's process. End it with `stop`."""
    inherited = [] if stdin == subprocess.DEVNULL else [os.dup(stdin)]  # a descriptor other than the guard's stdin
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str((inherited or [stdin])[0]), *command],
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=stderr,
            env=environment,
            cwd=directory,
            start_new_session=True,
            pass_fds=inherited,
        )
    finally:
        for descriptor in inherited:
            os.close(descriptor)


def interrupt(process: subprocess.Popen[bytes]) -> None:
    """Send SIGINT to the command of a guard that `start` returned. Does nothing if it has ended."""
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(b"\n")
            process.stdin.flush()


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a guard that `start` returned, the command and its descendants. Does nothing if it has ended."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(GRACE_S + FORCE_S + 2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


if __name__ == "__main__":
    os._exit(run(sys.argv[2:], int(sys.argv[1])))
