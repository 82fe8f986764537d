"""Runs one command so that neither it nor its descendants outlive the process that started it.

`python guard.py SIGNAL GRACE_S STDIN COMMAND...` starts the command with the descriptor STDIN as its standard input. It
waits until (a) the guard's own standard input, a pipe from the process that started it, reaches its end, because that
process has ended in any way; (b) the guard receives SIGTERM or SIGINT; or (c) the command ends. Then it ends the
command with SIGTERM and, after GRACE_S seconds, by force, and all of its descendants. On Linux the guard is their
subreaper, so that daemons and processes in their own sessions cannot escape. If the guard dies by SIGKILL, the kernel
sends SIGNAL to the command.

A byte in the pipe makes the guard send SIGINT to the command, which gets none from the terminal in its own session.

The guard runs outside the package (`python -I -S guard.py`) and imports only the standard library, so that it starts
in some 20 ms.
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
from types import FrameType

GRACE_S = 8.0
FORCE_S = 5.0
SIGNALLED = 128  # plus the signal's number: a shell's exit status for a command that a signal ended
# linux/prctl.h
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def run(command: list[str], *, orphan_signal: int, grace_s: float, stdin: int) -> int:
    """Run `command` until it ends, this process gets a signal to stop, or standard input ends. Returns its exit status.

    `stdin` is the command's own standard input, a descriptor or subprocess.DEVNULL.
    """
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    stopping: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if number != signal.SIGCHLD:
            stopping.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, note)
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    guard = os.getpid()

    def die_with_guard() -> None:
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, orphan_signal, 0, 0, 0)
            if os.getppid() != guard:  # the guard died before the prctl call
                os._exit(1)

    child = subprocess.Popen(command, stdin=stdin, start_new_session=True, preexec_fn=die_with_guard)
    status: int | None = None
    while status is None and not stopping:
        readable, _, _ = select.select([sys.stdin.fileno(), woken], [], [])
        if woken in readable:
            os.read(woken, 4096)
        if sys.stdin.fileno() in readable:
            if not os.read(sys.stdin.fileno(), 4096):
                break
            child.send_signal(signal.SIGINT)
        status = _reap(child.pid)
    if status is None:
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while status is None and time.monotonic() < deadline:
            time.sleep(0.02)
            status = _reap(child.pid)
    _end_descendants(child.pid)
    return 1 if status is None else status


def _reap(main: int) -> int | None:
    """Collect every child that has ended; return the exit status of `main` if it is among them, else None."""
    status = None
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, encoded = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid == main:
                ended = os.waitstatus_to_exitcode(encoded)
                status = ended if ended >= 0 else SIGNALLED - ended
    return status


def _end_descendants(main: int) -> None:
    deadline = time.monotonic() + FORCE_S
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(main, signal.SIGKILL)  # without /proc, nothing more can be done
    while (alive := descendants(os.getpid())) and time.monotonic() < deadline:
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
        _reap(main)


def descendants(ancestor: int) -> set[int]:
    """Return the ids of all descendants of `ancestor`, zombies included; empty without /proc."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):  # the process has ended meanwhile
            parents[int(stat.parent.name)] = int(stat.read_text(errors="replace").rsplit(")", 1)[1].split()[1])
    found = {ancestor}
    while more := {pid for pid, parent in parents.items() if parent in found and pid not in found}:
        found |= more
    return found - {ancestor}


def start(
    command: list[str],
    *,
    orphan_signal: signal.Signals,
    environment: dict[str, str],
    directory: Path,
    stdout: int,
    stderr: int | None = subprocess.STDOUT,
    stdin: int = subprocess.DEVNULL,
    grace_s: float = GRACE_S,
    umask: int = -1,
) -> subprocess.Popen[bytes]:
    """Start `command` under a guard, and return the guard's process. End it with `stop`.

    The streams and the umask are for the command, in the form that subprocess.Popen takes.
    """
    inherited = [] if stdin == subprocess.DEVNULL else [os.dup(stdin)]  # a descriptor other than the guard's stdin
    settings = map(str, (int(orphan_signal), grace_s, *(inherited or [stdin])))
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, *settings, *command],
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=stderr,
            env=environment,
            cwd=directory,
            start_new_session=True,
            pass_fds=inherited,
            umask=umask,
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
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(GRACE_S + FORCE_S + 2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


if __name__ == "__main__":
    _signal, _grace_s, _stdin, *_command = sys.argv[1:]
    os._exit(run(_command, orphan_signal=int(_signal), grace_s=float(_grace_s), stdin=int(_stdin)))
