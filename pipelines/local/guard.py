"""Run one command so that nothing of it outlives the process that asked for it.

`python guard.py SIGNAL GRACE_S STDIN COMMAND...` starts the command, STDIN its standard input, and waits until (a) the
guard's own standard input, a pipe from the process that started it, reaches its end: that process is gone, however it
went; (b) the guard receives SIGTERM or SIGINT; (c) the command ends. Then it ends the command with SIGTERM, after
GRACE_S by force, and with it whatever descends from it. On Linux the guard is the subreaper of all of these, so that
daemons and sessions of their own do not get away, and a guard that dies by SIGKILL takes the command with it: the
kernel sends SIGNAL.

A byte in that pipe sends the command SIGINT: its session gets none from the terminal.

It runs outside the package (`python -I -S guard.py`), so that it starts in some 20 ms: only the standard library here.
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
SIGNALLED = 128  # and the signal's number: what a shell calls the exit status of a command that a signal ended
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
            if os.getppid() != guard:  # it died before the kernel was asked
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
    """Collect every child that has ended; the exit status of `main` when it is among them."""
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
        os.killpg(main, signal.SIGKILL)  # all that can be done where there is no /proc
    while (alive := descendants(os.getpid())) and time.monotonic() < deadline:
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
        _reap(main)


def descendants(ancestor: int) -> set[int]:
    """Every process that descends from `ancestor`, zombies included. Empty where there is no /proc."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):  # it has ended by now
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
    """Start `command` under a guard; the returned process is the guard. End it with `stop`.

    The streams and the umask are the command's, as subprocess.Popen takes them.
    """
    inherited = [] if stdin == subprocess.DEVNULL else [os.dup(stdin)]  # a number that is not the guard's own stdin
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
    """Send SIGINT to the command of a guard that `start` returned. Harmless when it has ended."""
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(b"\n")
            process.stdin.flush()


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a guard that `start` returned, and with it the command and its descendants. Harmless when it has ended."""
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
